# %% [markdown]
# # The posterior itself: P_safe
#
# How likely is it that a network drawn from a Gaussian posterior keeps its class in a whole ball?
#
#     P_safe = Prob_{w ~ q}( argmax f(w, x') = c for all |x' - x| <= r )
#
# `bnncert.certify.safety` proves a lower bound without a single draw, `posterior_radius` the
# largest r at which it is 0.99; attacks on draws say how much more there may be.
# `python examples/safety.py`, a minute.

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

parser = argparse.ArgumentParser(description="P_safe of a Gaussian posterior.")
parser.add_argument("--quick", action="store_true", help="few steps and images, to try the script")
parser.add_argument("--out", default="safety.png", help="the picture")
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
steps, num_test, num_draws = (10, 6, 10) if options.quick else (300, 100, 200)

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
split = train_test_split(images, labels, test_size=450, random_state=0)
x, x_test, y, y_test = map(jnp.asarray, split)
x_test, y_test = x_test[:num_test], y_test[:num_test]
clip = (0.0, 1.0)


def apply(params, x):
    return params["w2"] @ jax.nn.relu(params["w1"] @ x + params["b1"]) + params["b2"]


# %% [markdown]
# The likelihood is of the posterior as a whole, `quantile_categorical`: a margin that all but a
# small share of it keeps in the ball. All 4,810 weights are Gaussian, and nothing is drawn.

# %%
w = jax.random.normal(jax.random.key(0), (64 + 10, 64)) / 25
params = {"w1": w[:64], "b1": jnp.zeros(64), "w2": w[64:], "b2": jnp.zeros(10)}
method = bc.infer.bbb.build(
    bc.likelihood.quantile_categorical(apply, clip=clip),
    bc.prior.normal(params, 0.3),
    num_data=len(y),
    optimizer=optax.adam(0.01),
    kl_weight=0.02,
    initial_scale=0.01,  # narrow, so that there is something to prove from the start
)
state, update = method.init(jax.random.key(1), params), jax.jit(method.update)
batch = bc.Batch(x, y, mask=jnp.ones(len(y)))
for step in range(steps):
    ramp = min(2 * step / steps, 1.0)
    threat = bc.Threat(eps=0.08 * ramp, lam=1 - 0.75 * ramp)
    state, info = update(jax.random.key(step), state, batch, threat)
q = method.posterior(state)

# %% [markdown]
# One image: bounds on P_safe in a ball, from below by a proof over the ball, from above by one at a
# point that an attack found.

# %%
label = int(jnp.argmax(apply(q.loc, x_test[0])))
for radius in (0.1, 0.2, 0.3, 0.4):
    region = bc.ball(x_test[0], radius, clip=clip)
    stays = bc.certify.class_stays(label, 10)
    found = bc.certify.safety(jax.random.key(2), apply, q, region, stays)
    print(f"P_safe of image 0 at radius {radius}: {found.lower:.4f} to {found.upper:.4f}")

# %% [markdown]
# All images: the radius up to which P_safe >= 0.99 is proved, and the one at which attacks break
# more than 1% of the draws.


# %%
@jax.jit
@jax.vmap
def proved(x):
    found = bc.certify.posterior_radius(apply, q, x, largest=0.3, steps=6, clip=clip)
    return found.predicted, found.radius


draws = q.sample(jax.random.key(3), num_draws)
radii = np.linspace(0, 0.3, 5 if options.quick else 31)


@jax.jit
def share_broken(eps):
    def of_draw(params, x, y):
        one = jax.tree.map(lambda leaf: leaf[None], params)
        return bc.attack.pgd(jax.random.key(4), apply, one, x, y, eps, clip=clip).broken

    each = jax.vmap(jax.vmap(of_draw, (0, None, None)), (None, 0, 0))
    return each(draws, x_test, predicted).mean(1)


predicted, radius = proved(x_test)
lost = np.array([share_broken(eps) for eps in radii]) > 0.01
attacked = radii[np.where(lost.any(0), lost.argmax(0), len(radii) - 1)]
print(f"accuracy at the posterior's mean {np.mean(predicted == y_test):.0%}")
print(f"median radius with P_safe >= 0.99: {np.median(radius):.3f} proved", end=", ")
print(f"{np.median(attacked):.3f} where attacks break 1% of {num_draws} draws")

# %%
figure, axes = plt.subplots(figsize=(4.4, 3.8), layout="constrained")
axes.axline((0, 0), slope=1, color="#6d767d", linewidth=0.8)
axes.scatter(radius, attacked, s=14, color="#0b63a5")
axes.set(xlabel="radius with P_safe >= 0.99, proved", ylabel="radius that breaks 1% of draws")
axes.set(xlim=(0, 0.31), ylim=(0, 0.31))
figure.savefig(options.out, dpi=110)
