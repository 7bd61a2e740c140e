"""Approximate inference: one algorithm a module, each with the same anatomy.

algorithm = bnncert.infer.svi.build(log_likelihood, prior, num_data=N, ...)
state = algorithm.init(key, params)
state, info = algorithm.update(key, state, batch, threat)
posterior = algorithm.posterior(state)

`mcmc`, which needs all the data at once, has `sample(key, params, data, threat)` in their place.
"""

from bnncert.infer import map, mcmc, sgmcmc, svi

__all__ = ["map", "mcmc", "sgmcmc", "svi"]
