"""Networks small enough to know what an attack should find."""

from functools import partial

import jax
import jax.numpy as jnp

NUM_SAMPLES, SIZE, CLASSES, BATCH = 5, 6, 3, 16


def mlp(params, x):
    return params["v"] @ jnp.tanh(params["w"] @ x) + params["b"]


def linear(params, x):
    return params["w"] @ x + params["b"]


def mlp_samples(seed: int = 0, classes: int = CLASSES):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "w": jax.random.normal(keys[0], (NUM_SAMPLES, 8, SIZE)),
        "v": jax.random.normal(keys[1], (NUM_SAMPLES, classes, 8)),
        "b": jax.random.normal(keys[2], (NUM_SAMPLES, classes)),
    }


def predictive(apply, samples, x):
    """The definition, in one line: mean over samples of softmax."""
    return jax.vmap(lambda params: jax.nn.softmax(apply(params, x)))(samples).mean(axis=0)


def margin_of(probs, y):
    return jnp.log(probs[y]) - jnp.log(jnp.delete(probs, y, assume_unique_indices=True).max())


@partial(jax.jit, static_argnums=0)
def clean_margins(apply, samples, xs, ys):
    def one(x, y):
        log_probs = jnp.log(predictive(apply, samples, x))
        return log_probs[y] - jnp.where(jnp.arange(log_probs.size) == y, -jnp.inf, log_probs).max()

    return jax.vmap(one)(xs, ys)


@partial(jax.jit, static_argnums=0)
def chosen(apply, samples, xs):
    """The predicted classes: attacked there, every margin starts positive."""
    return jax.vmap(lambda x: predictive(apply, samples, x).argmax())(xs)
