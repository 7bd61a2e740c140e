"""Approximate inference: one algorithm a module, each with the same anatomy.

algorithm = bnncert.infer.svi.build(log_likelihood, prior, num_data=N, ...)
state = algorithm.init(key, params)
state, info = algorithm.update(key, state, batch, threat)
posterior = algorithm.posterior(state)

`mcmc`, which needs all the data at once, has `sample(key, params, data, threat)` in their place,
and `laplace`, which starts from trained weights, `fit(key, params, data, threat)`.
"""

from bnncert.infer import (
    diagnostics,
    ensemble,
    ivon,
    laplace,
    map,
    mcmc,
    noisy_adam,
    sgmcmc,
    svi,
    swag,
    vogn,
)

__all__ = [
    "diagnostics",
    "ensemble",
    "ivon",
    "laplace",
    "map",
    "mcmc",
    "noisy_adam",
    "sgmcmc",
    "svi",
    "swag",
    "vogn",
]
