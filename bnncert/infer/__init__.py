"""Approximate inference: one algorithm a module, each with the same anatomy.

algorithm = bnncert.infer.svi.build(log_likelihood, prior, num_data=N, ...)
state = algorithm.init(key, params)
state, info = algorithm.update(key, state, batch, threat)
posterior = algorithm.posterior(state)
"""

from bnncert.infer import ensemble, ivon, laplace, map, noisy_adam, svi, swag, vogn

__all__ = ["ensemble", "ivon", "laplace", "map", "noisy_adam", "svi", "swag", "vogn"]
