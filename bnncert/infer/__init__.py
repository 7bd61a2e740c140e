"""Approximate inference: one algorithm a module, each with the same anatomy.

    algorithm = bnncert.infer.bbb.build(log_likelihood, prior, num_data=N, ...)
    state = algorithm.init(key, params)
    state, info = algorithm.update(key, state, batch, threat)
    posterior = algorithm.posterior(state)

    map                        one network, the baseline
    bbb, low_rank, guide       variational inference: independent normals, low rank, a guide of your
                               own; `svi` is the door to all three, `elbo` what they maximise
    vogn, noisy_adam, ivon     the same independent normals by natural gradients
    swag, laplace              a Gaussian around trained weights
    sgld, sghmc                chains on minibatches
    hmc, nuts                  chains on all the data; `mcmc` takes the kernel by name
    ensemble                   K runs of any of them as one

`hmc` and `nuts`, which need all the data at once, have `sample(key, params, data, threat)` in place
of the three functions, and `laplace`, which starts from trained weights, `fit(key, params, data,
threat)`. `diagnostics` says whether chains agree.
"""

from bnncert.infer import _sgmcmc as sgmcmc  # SGLD and SGHMC, told apart by the friction
from bnncert.infer import (
    bbb,
    diagnostics,
    ensemble,
    guide,
    hmc,
    ivon,
    laplace,
    low_rank,
    map,
    mcmc,
    noisy_adam,
    nuts,
    sghmc,
    sgld,
    svi,
    swag,
    vogn,
)
from bnncert.infer._elbo import ELBO, elbo
from bnncert.infer.bbb import MeanField
from bnncert.infer.low_rank import LowRank

__all__ = [
    "ELBO",
    "LowRank",
    "MeanField",
    "bbb",
    "diagnostics",
    "elbo",
    "ensemble",
    "guide",
    "hmc",
    "ivon",
    "laplace",
    "low_rank",
    "map",
    "mcmc",
    "noisy_adam",
    "nuts",
    "sghmc",
    "sgld",
    "sgmcmc",
    "svi",
    "swag",
    "vogn",
]
