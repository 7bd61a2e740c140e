"""Keeps a compiler that computes wrong sums from doing so.

jaxlib 0.10.2, and no other, compiles products that are summed and then scaled or shifted under
`vmap` to code that adds the wrong numbers on CPUs (github.com/jax-ml/jax/issues/39103). A bound is
worth what its arithmetic is worth, so the project's requirements exclude that version. Where it is
installed all the same, the fusion at fault is switched off, which has to happen before JAX first
computes.
"""

import os
import warnings
from importlib.metadata import version

_AT_FAULT = "0.10.2"
_FLAG = "--xla_cpu_experimental_ynn_fusion_type="


def avoid_wrong_sums(jaxlib: str | None = None) -> bool:
    """Switches the fusion off, with a warning, if jaxlib is the version at fault.

    Args:
        jaxlib: its version; None: that which is installed.

    Returns:
        Whether it is the version at fault.
    """
    if (version("jaxlib") if jaxlib is None else jaxlib) != _AT_FAULT:
        return False
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()
    warnings.warn(
        f"jaxlib {_AT_FAULT} computes wrong sums on CPUs. bnncert has set XLA_FLAGS={_FLAG} "
        "against it, which helps if JAX has computed nothing yet; install another version of jax "
        "and jaxlib.",
        stacklevel=2,
    )
    return True
