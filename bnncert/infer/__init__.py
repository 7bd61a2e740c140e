"""Approximate inference: one algorithm a module, each with the same anatomy.

algorithm = bnncert.infer.svi.build(log_likelihood, prior, num_data=N, ...)
state = algorithm.init(key, params)
state, info = algorithm.update(key, state, batch, threat)
posterior = algorithm.posterior(state)
"""

from bnncert.infer import ivon, map, noisy_adam, svi, vogn

__all__ = ["ivon", "map", "noisy_adam", "svi", "vogn"]
