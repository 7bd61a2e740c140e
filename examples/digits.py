# %% [markdown]
# # Digits, from data to proof
#
# Train a Bayesian network robustly, then ask of each test image how far its pixels may move: proved
# (`bnncert.certify`), and tried (`bnncert.attack`). `python examples/digits.py`, 20 seconds.

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

parser = argparse.ArgumentParser(description="Digits, from data to proof.")
parser.add_argument("--quick", action="store_true", help="few steps and images, to try the script")
parser.add_argument("--out", default="digits.png", help="the picture")
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
steps, num_test, num_samples = (20, 24, 2) if options.quick else (300, 450, 16)
radii = np.linspace(0, 0.15, 3 if options.quick else 11)

# %% [markdown]
# The data: images of 8 x 8 pixels in [0, 1]. The model: any JAX function of one image.

# %%
images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
split = train_test_split(images, labels, test_size=450, random_state=0)
x, x_test, y, y_test = map(jnp.asarray, split)
x_test, y_test = x_test[:num_test], y_test[:num_test]


def apply(params, x):
    hidden = jax.nn.relu(params["w1"] @ x + params["b1"])
    return params["w2"] @ hidden + params["b2"]


keys, width = jax.random.split(jax.random.key(0)), 96
params = {
    "w1": jax.random.normal(keys[0], (width, 64)) / 25,  # bounds start out tight
    "b1": jnp.zeros(width),
    "w2": jax.random.normal(keys[1], (10, width)) / 25,
    "b2": jnp.zeros(10),
}


# %% [markdown]
# The posterior: Bayes by Backprop, whose likelihood is the worst case in a ball that grows while it
# trains. `Threat` says how large the ball is, and how much the clean image still counts.

# %%
method = bc.infer.bbb.build(
    bc.likelihood.robust_categorical(apply, clip=(0.0, 1.0)),
    bc.prior.normal(params, 0.3),
    num_data=len(y),
    optimizer=optax.adam(0.01),
    kl_weight=0.1,
)
state, update = method.init(jax.random.key(1), params), jax.jit(method.update)
batch = bc.Batch(x, y, mask=jnp.ones(len(y)))
for step in range(steps):
    ramp = min(2 * step / steps, 1.0)
    threat = bc.Threat(eps=0.08 * ramp, lam=1 - 0.75 * ramp)
    state, info = update(jax.random.key(step), state, batch, threat)

# %% [markdown]
# What is deployed is the average over some draws: certificate and attack are of that average. Both
# are functions of one image, which `vmap` maps over all, and the radius is one more argument.

# %%
samples = method.posterior(state).sample(jax.random.key(2), num_samples)


@jax.jit
def examine(eps):
    def one(x, y):
        decision = bc.certify.decision(apply, samples, bc.ball(x, eps, clip=(0.0, 1.0)), x=x)
        attack = bc.attack.pgd(jax.random.key(3), apply, samples, x, y, eps, clip=(0.0, 1.0))
        right = decision.predicted == y
        return right & decision.robust, right & ~attack.broken, attack.x

    return jax.vmap(one)(x_test, y_test)


found = [examine(eps) for eps in radii]
certified, attacked = (np.array([np.mean(each[i]) for each in found]) for i in (0, 1))
assert (certified <= attacked).all()  # else a proof or an attack were wrong
for eps, proved, left in zip(radii, certified, attacked, strict=True):
    print(f"radius {eps:.3f}: {proved:.1%} proved, {left:.1%} left by the attack")

# %% [markdown]
# The robust accuracy itself lies between the two curves. Beside them, images whose class the attack
# changed at the largest radius.

# %%
broken = np.flatnonzero(np.asarray(found[0][1] & ~found[-1][1]))[:6]
figure = plt.figure(figsize=(8, 3), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
axes = left.subplots()
axes.fill_between(radii, certified, attacked, color="#e9b949", alpha=0.4, label="not known")
axes.plot(radii, attacked, color="#c2410d", label="left by the attack")
axes.plot(radii, certified, color="#0b63a5", label="proved")
axes.set(xlabel="radius, in pixels in [0, 1]", ylabel="accuracy", xlim=(0, radii[-1]), ylim=(0, 1))
axes.legend(frameon=False, loc="lower left")
right.suptitle(f"changed at radius {radii[-1]:.2f}")
for panel, i in zip(right.subplots(2, 3).flat, broken, strict=False):
    panel.set_title(f"a {y_test[i]}", fontsize=9)
    panel.imshow(found[-1][2][i].reshape(8, 8), cmap="gray", vmin=0, vmax=1)
for panel in right.axes:
    panel.axis("off")
figure.savefig(options.out, dpi=110)
