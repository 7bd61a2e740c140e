"""A progress bar for chains that run side by side in one compiled loop.

NumPyro's own counts the draws that were dispatched, which runs far ahead of those that are done.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpyro.infer import HMC
from tqdm.auto import tqdm


def follow(run: Callable[..., Any], total: int) -> Callable[..., Any]:
    """Jits `run`, and shows a bar while it runs.

    Args:
        run: takes arrays and `watch=`, with which it wraps its kernel.
        total: draws of each chain, the warm-up among them.

    Returns:
        `(*arrays) -> result`. Every call compiles anew.
    """

    def shown(*arrays: Any) -> Any:
        with tqdm(total=total, desc="draws", unit="draw") as bar:

            def advance(draw: Any) -> None:
                bar.update(max(int(np.max(draw)) - bar.n, 0))  # one number, or one a chain

            def watch(kernel: HMC) -> HMC:
                sample = kernel.sample

                def watched(state: Any, model_args: Any, model_kwargs: Any) -> Any:
                    new = sample(state, model_args, model_kwargs)
                    jax.debug.callback(advance, new.i)
                    return new

                kernel.sample = watched
                return kernel

            def watching(*arrays: Any) -> Any:
                return run(*arrays, watch=watch)

            found = jax.jit(watching)(*arrays)
            jax.effects_barrier()
            return found

    return shown
