# %% [markdown]
# # Certified radii of three posteriors
#
# One network (`map`), five of them averaged (`ensemble`) and 16 draws of a Gaussian (`bbb`): three
# posteriors behind one interface, trained alike, once ordinarily and once robustly. The largest
# ball in which each image keeps its class is found by bisection. `python examples/radii.py`, 50
# seconds.

# %%
import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnncert as bc

parser = argparse.ArgumentParser(description="Certified radii of three posteriors.")
parser.add_argument("--quick", action="store_true", help="few steps and images, to try the script")
parser.add_argument("--out", default="radii.png", help="the picture")
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
steps, num_test, members, draws = (10, 12, 2, 2) if options.quick else (300, 150, 5, 16)

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
split = train_test_split(images, labels, test_size=450, random_state=0)
x, x_test, y, y_test = map(jnp.asarray, split)
x_test, y_test = x_test[:num_test], y_test[:num_test]
batch = bc.Batch(x, y, mask=jnp.ones(len(y)))


def apply(params, x):
    return params["w2"] @ jax.nn.relu(params["w1"] @ x + params["b1"]) + params["b2"]


def initialise(key):
    w = jax.random.normal(key, (64 + 10, 64)) / 25
    return {"w1": w[:64], "b1": jnp.zeros(64), "w2": w[64:], "b2": jnp.zeros(10)}


# %% [markdown]
# Three methods. Each is `init`, `update` and `posterior`; an ensemble is made of another method.

# %%
loglik = bc.likelihood.robust_categorical(apply, clip=(0.0, 1.0))
prior = bc.prior.normal(initialise(jax.random.key(0)), 0.3)
common = {"num_data": len(y), "optimizer": optax.adam(0.01)}
one = bc.infer.map.build(loglik, prior, prior_weight=0.1, **common)
methods = {  # the method, where it starts, and how many networks are deployed
    "map": (one, initialise(jax.random.key(0)), 1),
    "ensemble": (bc.infer.ensemble.build(one, members), initialise, members),
    "bbb": (
        bc.infer.bbb.build(loglik, prior, kl_weight=0.1, **common),
        initialise(jax.random.key(0)),
        draws,
    ),
}


def train(method, start, eps):
    """Trains against radii up to eps; with eps 0 it is ordinary training."""

    def step(state, i):
        ramp = jnp.minimum(2 * i / steps, 1.0)
        threat = bc.Threat(eps=eps * ramp, lam=1 - 0.75 * ramp)
        return method.update(jax.random.key(i), state, batch, threat)

    state = method.init(jax.random.key(1), start)
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps)))(state)
    return method.posterior(state)


# %% [markdown]
# What is certified is the average over what is deployed: the networks themselves, of `map` and the
# ensemble; of the Gaussian, draws.


# %%
@jax.jit
def certified(samples):
    def one(x, y):
        found = bc.certify.radius(apply, samples, x, largest=0.4, steps=6, clip=(0.0, 1.0))
        return jnp.where(found.predicted == y, found.radius, -1.0)  # wrong from the start

    return jax.vmap(one)(x_test, y_test)


radii = {}
for name, (method, start, deployed) in methods.items():
    for training, eps in (("ordinary", 0.0), ("robust", 0.08)):
        samples = train(method, start, eps).sample(jax.random.key(2), deployed)
        found = radii[name, training] = np.asarray(certified(samples))
        print(
            f"{name}, {training}: accuracy {np.mean(found >= 0):.1%}, "
            f"median certified radius {np.median(found):.3f}"
        )

# %% [markdown]
# The share of images that are right and proved beyond each radius: at 0 it is the accuracy.

# %%
figure, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
line = np.linspace(0, 0.3, 200)
for (name, training), found in radii.items():
    colour, style = f"C{list(methods).index(name)}", "-" if training == "robust" else ":"
    shares = (found[:, None] > line).mean(0)
    shares[0] = np.mean(found >= 0)
    axes.plot(line, shares, style, color=colour, label=f"{name}, {training}")
axes.set(xlabel="radius, in pixels in [0, 1]", ylabel="share of images proved beyond it")
axes.set(xlim=(0, line[-1]), ylim=(0, 1))
axes.legend(frameon=False, fontsize=8)
figure.savefig(options.out, dpi=110)
