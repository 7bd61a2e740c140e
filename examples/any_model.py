# %% [markdown]
# # Any JAX model, as it is
#
# A convolutional network of Flax NNX, trained by a loop of your own: `bnncert.bound` turns it into
# a function that bounds its outputs over a whole set of inputs, and three of them, averaged, are
# certified. Nothing of the model is written anew. `python examples/any_model.py`, 45 seconds.

# %%
import argparse
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnncert as bc

parser = argparse.ArgumentParser(description="Bounds and a certificate of a Flax NNX model.")
parser.add_argument("--quick", action="store_true", help="few steps and images, to try the script")
parser.add_argument("--out", default="any_model.png", help="the picture")
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
steps, num_test, members = (20, 8, 2) if options.quick else (300, 60, 3)

images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
split = train_test_split(images, labels, test_size=num_test, random_state=0)
x, x_test, y, y_test = map(jnp.asarray, split)


# %% [markdown]
# A module as you may have one; bnncert takes `apply(params, x)` of one example of it. Its training
# is ordinary: cross-entropy, with some noise on the pixels. Three starts make an ensemble.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs, use_running_average=True)
        self.hidden = nnx.Linear(4 * 4 * 8, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.norm(self.conv(x)))
        return self.out(nnx.gelu(self.hidden(x.reshape(*x.shape[:-3], -1))))


graph, _, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)


def apply(params, x):
    return nnx.merge(graph, params, rest)(x)


def train(seed):
    params = nnx.split(Net(nnx.Rngs(seed)), nnx.Param, ...)[1]
    optimizer = optax.adamw(3e-3, weight_decay=0.1)

    def loss(params, x):
        logits = jax.vmap(apply, (None, 0))(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, key):
        params, state = carry
        slope = jax.grad(loss)(params, x + 0.2 * jax.random.normal(key, x.shape))
        updates, state = optimizer.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


samples = bc.posterior.stack([train(seed) for seed in range(members)])

# %% [markdown]
# Bounds of one network's logits on a ball, by three methods: box.lower <= f(x') <= box.upper. And a
# certificate of the average of all, on every test image.

# %%
first = jax.tree.map(lambda leaf: leaf[0], samples)
region = bc.ball(x_test[0], 0.03, clip=(0.0, 1.0))
methods = ("ibp", "crown-ibp", "crown")
boxes = {name: jax.jit(bc.bound(apply, name))(first, region) for name in methods}
share = jax.random.uniform(jax.random.key(0), (2000, *x_test[0].shape))
points = region.lower + share * (region.upper - region.lower)
logits = jax.vmap(apply, (None, 0))(first, points)


@partial(jax.jit, static_argnums=0)
def certified(name, eps):
    def one(x, y):
        ball = bc.ball(x, eps, clip=(0.0, 1.0))
        found = bc.certify.decision(apply, samples, ball, x=x, method=name)
        return found.robust & (found.predicted == y)

    return jax.vmap(one)(x_test, y_test).mean()


radii, curves = np.linspace(0, 0.06, 2 if options.quick else 7), {}
for name in methods[: 2 if options.quick else 3]:
    curves[name] = np.array([certified(name, eps) for eps in radii])
    print(f"{name}: certified {', '.join(f'{share:.0%}' for share in curves[name])}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for place, (name, box) in enumerate(boxes.items()):
    classes = np.arange(10) + 0.18 * (place - 1)
    left.vlines(classes, box.lower, box.upper, f"C{place}", linewidth=3, label=name)
left.vlines(np.arange(10) + 0.36, logits.min(0), logits.max(0), "k", label="of 2,000 points")
left.set(xlabel="class", ylabel="logits", xticks=range(10), title="bounds at one image")
for name, curve in curves.items():
    right.plot(radii, curve, label=name)
right.set(xlabel="radius", ylabel="certified accuracy", xlim=(0, radii[-1]), ylim=(0, 1))
left.legend(frameon=False, fontsize=7, ncols=2)
figure.savefig(options.out, dpi=110)
