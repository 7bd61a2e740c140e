# %% [markdown]
# # Draws of another library's sampler
#
# NUTS by BlackJAX draws the weights of a small network on two moons; bnncert certifies the average
# over the draws, and says how far each point may move before its class can change. Any draws will
# do: what is certified is a pytree with one leading axis. `python examples/sampler.py`, 20 seconds.

# %%
import argparse

import blackjax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_moons
from sklearn.preprocessing import StandardScaler

import bnncert as bc

parser = argparse.ArgumentParser(description="Certificates of draws by BlackJAX.")
parser.add_argument("--quick", action="store_true", help="few draws and points, to try the script")
parser.add_argument("--out", default="sampler.png", help="the picture")
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
num_warmup, num_draws, num_test = (20, 20, 10) if options.quick else (300, 400, 60)

points, labels = make_moons(300, noise=0.15, random_state=0)
points = StandardScaler().fit_transform(points)
x, x_test = (jnp.asarray(part, jnp.float32) for part in (points[:200], points[200:][:num_test]))
y, y_test = jnp.asarray(labels[:200]), jnp.asarray(labels[200:][:num_test])


def apply(params, x):  # one logit z of two classes stands for (0, z)
    hidden = jnp.tanh(params["w1"] @ x + params["b1"])
    return params["w2"] @ hidden + params["b2"]


# %% [markdown]
# The posterior as BlackJAX wants it: a log-density over the pytree of weights.


# %%
def log_density(params):
    logits = jax.vmap(apply, (None, 0))(params, x)[:, 0]
    log_likelihood = -jax.nn.softplus(jnp.where(y == 1, -logits, logits)).sum()
    log_prior = sum(-0.5 * jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
    return log_likelihood + log_prior


shapes = {"w1": (8, 2), "b1": (8,), "w2": (1, 8), "b2": (1,)}
keys = jax.random.split(jax.random.key(0), len(shapes))
start = {name: jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=True)}
warmup = blackjax.window_adaptation(blackjax.nuts, log_density, max_num_doublings=7)
(state, tuned), _ = warmup.run(jax.random.key(1), start, num_warmup)
kernel = blackjax.nuts(log_density, **tuned)


def step(state, key):
    state, info = kernel.step(key, state)
    return state, (state.position, info.is_divergent)


_, (draws, divergent) = jax.lax.scan(step, state, jax.random.split(jax.random.key(2), num_draws))
samples = jax.tree.map(lambda leaf: leaf[::10], draws)  # every tenth is deployed
print(f"{num_draws} draws, {int(divergent.sum())} divergent; {num_draws // 10} are deployed")

# %% [markdown]
# For each test point the largest square around it on which the predictive keeps its class, proved;
# and the nearest point on which an attack changes it.


# %%
@jax.jit
@jax.vmap
def radii(x):
    proved = bc.certify.radius(apply, samples, x, largest=1.0, method="crown")
    tried = bc.certify.attacked_radius(
        jax.random.key(3), apply, samples, x, proved.predicted, largest=1.0, steps=6
    )
    return proved.predicted, proved.radius, tried.radius


predicted, proved, tried = map(np.asarray, radii(x_test))
assert (proved <= tried).all()  # else a proof or an attack were wrong
print(f"accuracy {np.mean(predicted == y_test):.0%}")
print(f"median radius: {np.median(proved):.3f} proved, {np.median(tried):.3f} attacked")

# %%
line = jnp.linspace(-2.4, 2.4, 30 if options.quick else 120)
grid = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)
logits = jax.vmap(jax.vmap(apply, (None, 0)), (0, None))(samples, grid)[..., 0]
chance = np.asarray(jax.nn.sigmoid(logits).mean(0).reshape(line.size, line.size))

figure, axes = plt.subplots(figsize=(5, 4.4), layout="constrained")
shades = axes.contourf(line, line, chance, np.linspace(0, 1, 11), cmap="RdBu", alpha=0.6)
axes.scatter(*x_test.T, c=y_test, cmap="RdBu", edgecolors="w", s=24, zorder=3)
for centre, radius in zip(x_test[::5], proved[::5], strict=True):  # a few, to be seen apart
    square = plt.Rectangle(centre - radius, 2 * radius, 2 * radius, fill=False, linewidth=1.5)
    axes.add_patch(square)
axes.set(xlabel="first feature", ylabel="second feature", xlim=(-2.4, 2.4), ylim=(-2.4, 2.4))
axes.set(title="in a square the class is proved not to change")
figure.colorbar(shades, label="probability of the second class")
figure.savefig(options.out, dpi=110)
