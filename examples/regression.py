# %% [markdown]
# # A regression with certified bands
#
# How a patient's diabetes will progress, from ten measurements, each of which may be off by a tenth
# of its standard deviation. For every patient in the test set the predictive's mean is proved to
# stay in a band, and its 95% interval in a wider one; trained robustly, the bands are narrower.
# `python examples/regression.py`, 15 seconds.

# %%
import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import bnncert as bc

parser = argparse.ArgumentParser(description="A regression with certified bands.")
parser.add_argument("--quick", action="store_true", help="few steps and data, to try the script")
parser.add_argument("--eps", type=float, default=0.1, help="in standard deviations of a feature")
parser.add_argument("--out", default="regression.png", help="the picture")
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
steps, num_test, num_samples = (20, 10, 4) if options.quick else (1500, 89, 32)

table, target = load_diabetes(return_X_y=True, scaled=False)
split = train_test_split(table, target[:, None], test_size=89, random_state=0)
table_units, target_units = (StandardScaler().fit(part) for part in split[::2])  # training data
x, x_test = (jnp.asarray(table_units.transform(part), jnp.float32) for part in split[:2])
y, y_test = (jnp.asarray(target_units.transform(part), jnp.float32) for part in split[2:])
x_test, y_test = x_test[:num_test], y_test[:num_test]
noise = 0.7  # of the target, in its standard deviations: what plain fits leave


def apply(params, x):
    hidden = jax.nn.relu(params["w1"] @ x + params["b1"])
    return params["w2"] @ hidden + params["b2"]


# %% [markdown]
# Bayes by Backprop, with a normal error model; robustly, the error is the worst that any
# measurements in the ball could give.

# %%
keys = jax.random.split(jax.random.key(0))
params = {
    "w1": jax.random.normal(keys[0], (32, 10)) / 4,
    "b1": jnp.zeros(32),
    "w2": jax.random.normal(keys[1], (1, 32)) / 13,
    "b2": jnp.zeros(1),
}
method = bc.infer.bbb.build(
    bc.likelihood.robust_gaussian(apply, noise_scale=noise),
    bc.prior.normal(params, 0.3),
    num_data=len(y),
    optimizer=optax.adam(0.005),
    kl_weight=0.3,
)
batch = bc.Batch(x, y, mask=jnp.ones(len(y)))


@jax.jit
def train(eps):
    def step(state, i):
        ramp = jnp.minimum(2 * i / steps, 1.0)
        threat = bc.Threat(eps=eps * ramp, lam=1 - 0.75 * ramp)
        return method.update(jax.random.key(i), state, batch, threat)

    state = method.init(jax.random.key(1), params)
    return jax.lax.scan(step, state, jnp.arange(steps))[0]


# %% [markdown]
# The predictive over draws has a mean and a variance; both are bounded over the ball around each
# patient, and with them the interval, mean +- 2 sd, noise included.


# %%
@jax.jit
def bands(samples, eps):
    def one(x):
        found = bc.certify.mean_and_variance(apply, samples, bc.ball(x, eps), method="crown")
        reach = 2 * jnp.sqrt(found.variance.upper + noise**2)
        return found.mean.lower, found.mean.upper, reach

    return [part[:, 0] for part in jax.vmap(one)(x_test)]


middle, unit = float(target_units.mean_[0]), float(target_units.scale_[0])
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
for panel, (name, eps) in zip(panels, {"plain": 0.0, "robust": options.eps}.items(), strict=True):
    samples = method.posterior(train(eps)).sample(jax.random.key(2), num_samples)
    mean = jax.vmap(jax.vmap(apply, (None, 0)), (0, None))(samples, x_test).mean(0)[:, 0]
    lower, upper, reach = bands(samples, options.eps)
    worst = jnp.maximum(upper - y_test[:, 0], y_test[:, 0] - lower)
    clean, proved = (unit * jnp.sqrt(jnp.square(e).mean()) for e in (mean - y_test[:, 0], worst))
    print(
        f"{name}: root mean square error {clean:.1f}, at most {proved:.1f} in the ball (proved); "
    )
    print(f"    half of the mean's band {unit * (upper - lower).mean() / 2:.1f} on average")
    order, place = jnp.argsort(mean), np.arange(len(mean))
    score = [middle + unit * each[order] for each in (lower - reach, upper + reach, lower, upper)]
    panel.fill_between(place, *score[:2], color="#0b63a5", alpha=0.15, label="95% interval, proved")
    panel.fill_between(place, *score[2:], color="#0b63a5", alpha=0.6, label="mean, proved")
    panel.plot(place, middle + unit * y_test[order, 0], "k.", markersize=4, label="patients")
    panel.set(title=name, xlabel="patients, by their prediction")
panels[0].set_ylabel("progression after a year")
panels[0].legend(frameon=False, fontsize=8, loc="upper left")
figure.savefig(options.out, dpi=110)
