"""Approximate inference: one algorithm a module, each with the same anatomy.

algorithm = bnncert.infer.svi.build(log_likelihood, prior, num_data=N, ...)
state = algorithm.init(key, params)
state, info = algorithm.update(key, state, batch, threat)
posterior = algorithm.posterior(state)
"""

from bnncert.infer import ensemble, laplace, map, svi, swag

__all__ = ["ensemble", "laplace", "map", "svi", "swag"]
