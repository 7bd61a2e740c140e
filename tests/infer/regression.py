"""Bayesian linear regression with a known posterior, and a loop that trains on it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnncert import likelihood
from bnncert.types import Batch, Threat

PLAIN = Threat(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0))


class Problem(NamedTuple):
    """y = x w + noise, and a normal prior N(0, prior_scale^2) on w, of length 3."""

    x: np.ndarray
    y: np.ndarray
    noise: float = 0.5
    prior_scale: float = 1.5

    @property
    def curvature(self):
        """The Hessian of the mean negative log-likelihood."""
        return self.x.T @ self.x / (len(self.x) * self.noise**2)

    def damping(self, kl_weight=1.0):
        return kl_weight / (len(self.x) * self.prior_scale**2)

    def mean(self, kl_weight=1.0):
        precision = self.curvature + self.damping(kl_weight) * np.eye(3)
        return np.linalg.solve(precision, self.x.T @ self.y / (len(self.x) * self.noise**2))

    def scale(self, h, kl_weight=1.0):
        """Standard deviations of a mean-field normal whose curvature is h."""
        return np.sqrt(kl_weight / (len(self.x) * (h + self.damping(kl_weight))))

    def log_likelihood(self):
        return likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=self.noise)


def problem(num=50, **options):
    """Correlated inputs: the posterior is no product of normals."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, 3)) @ np.array([[1.0, 0.6, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    noise = options.get("noise", 0.5)
    return Problem(x, x @ np.array([1.0, -2.0, 0.5]) + noise * rng.normal(size=num), **options)


def train(algorithm: Any, here: Problem, batch_size: int, steps: int, keep: int) -> Any:
    """Trains on random minibatches, from weights .1 off the mean (far from it, squared gradients
    are large, and slow to be forgotten); returns the last posterior, and the mean precision of the
    last `keep` steps (the curvature is a running mean of noisy estimates)."""
    x, y = jnp.float32(here.x), jnp.float32(here.y)

    @jax.jit
    def run(state, key):
        def step(state, key):
            rows = jax.random.choice(key, len(y), (batch_size,), replace=False)
            data = Batch(x[rows], y[rows], jnp.ones(batch_size))
            state, _ = algorithm.update(jax.random.fold_in(key, 1), state, data, PLAIN)
            return state, 1 / algorithm.posterior(state).scale ** 2

        return jax.lax.scan(step, state, jax.random.split(key, steps))

    start = algorithm.init(jax.random.key(0), jnp.float32(here.mean()) + 0.1)
    state, precisions = run(start, jax.random.key(3))
    return algorithm.posterior(state), precisions[-keep:].mean(0)
