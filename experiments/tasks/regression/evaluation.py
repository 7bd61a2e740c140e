"""What is known about a regression's predictive: clean, attacked and certified.

The predictor is the average m(x) of the S deployed networks, with variance v(x) over them; the
predictive of y is the mixture of N(f_s(x), noise^2), of mean m and variance v + noise^2. Over the
ball of radius eps around a datum, `certify.mean_and_variance` gives

    lower <= m <= upper,   least <= v <= most,   and so the worst error
    max |m(x') - y|  <=  max(upper - y, y - lower)                    certified

and an attack that looks for the largest and the smallest m finds points x' that bound the same
error, and the reach of m, from below. At every datum clean <= attacked <= certified; a violation
stops the run. The 95% interval is m +- 2 sd. Those of all x' in the ball lie in

    [lower - 2 sqrt(most + noise^2), upper + 2 sqrt(most + noise^2)]  certified interval

and y lies in each of them, it is *covered everywhere*, if its worst error is proved to be at most
2 sqrt(least + noise^2).

Of a factorised Gaussian `certify.expectation` bounds the same without draws: E_w f, and the
deviation of f over w.

Everything is in standard deviations of the target; log-likelihoods in nats a datum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import logsumexp

from bnncert import certify
from bnncert.posterior import MeanField
from bnncert.sets import Box, ball
from bnncert.types import Apply, Stacked

from ...pipeline.evaluation import SoundnessError
from ...setup.data import Split
from .settings import Settings

Vector = Float[np.ndarray, " num"]
Columns = dict[str, np.ndarray]
"""One row a datum, float64; "outputs" has the networks' own, (S, num)."""

WIDTH = 2.0
"""Of half a predictive interval, in its standard deviations."""

Examine = Callable[[Any, Stacked, Float[np.ndarray, "num features"], float], Columns]
"""`(posterior, samples, x, eps) -> Columns`: what does not depend on the targets."""


def examiner(settings: Settings, apply: Apply) -> Examine:
    """What bounds, attacks and predicts; compiled once for all radii and posteriors of one kind.

    Args:
        settings: method, attack and seed.
        apply: `(params, x) -> mean (1,)` for one datum.

    Returns:
        `examine(posterior, samples, x, eps)`. It raises SoundnessError where an attacked mean lies
        outside its certified interval.
    """

    def outputs(samples: Stacked, x: Array) -> Array:
        return jax.vmap(lambda params: jax.vmap(apply, (None, 0))(params, x)[:, 0])(samples)

    def bounds(posterior: Any, samples: Stacked, x: Array, eps: Array) -> dict[str, Array]:
        region = ball(x, eps)
        found = certify.mean_and_variance(apply, samples, region, method=settings.certify_method)
        columns = {
            "lower": found.mean.lower,
            "upper": found.mean.upper,
            "least": found.variance.lower,
            "most": found.variance.upper,
        }
        if isinstance(posterior, MeanField):
            expected = certify.expectation(apply, posterior, region)
            columns |= {
                "expected_lower": expected.outputs.lower,
                "expected_upper": expected.outputs.upper,
                "expected_deviation": expected.deviation,
            }
        return {name: column[0] for name, column in columns.items()}

    def reach(samples: Stacked, x: Array, eps: Array, i: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(jax.random.key(settings.seed), i)
        mean = lambda x: jax.vmap(apply, (0, None))(samples, x).mean()  # noqa: E731
        region: Any = ball(x, eps)
        draws = jax.random.uniform(key, (settings.attack_restarts, *x.shape), minval=-1.0)
        starts = jnp.clip(x + eps * draws, region.lower, region.upper).at[0].set(x)
        return extremes(mean, region, starts, settings.attack_steps)

    def examine(posterior: Any, samples: Stacked, x: np.ndarray, eps: float) -> Columns:
        radius, number = jnp.float32(eps), jnp.arange(len(x))
        # Bounds are those of products at full precision; on CPUs there is no other.
        with jax.default_matmul_precision("highest"):
            bounded = bound_all(posterior, samples, jnp.asarray(x), radius)
            points = attack_all(samples, jnp.asarray(x), radius, number)
            found = [predict(samples, here) for here in (jnp.asarray(x), *points)]
        each = [np.asarray(part, np.float64) for part in found]
        means = np.stack([part.mean(0) for part in each])
        columns = {name: np.asarray(column, np.float64) for name, column in bounded.items()}
        columns |= {"outputs": each[0], "mean": means[0], "variance": each[0].var(0)}
        columns |= {"attacked_low": means.min(0), "attacked_high": means.max(0)}
        check_reach(columns, eps)
        return columns

    predict = jax.jit(outputs)
    bound_all = jax.jit(jax.vmap(bounds, (None, None, 0, None)))
    attack_all = jax.jit(jax.vmap(reach, (None, 0, None, 0)))
    return examine


def extremes(
    mean: Callable[[Array], Array], region: Box, starts: Array, steps: int
) -> tuple[Array, Array]:
    """Points of a box where a function is least and largest, as gradient-sign steps find them.

    Args:
        mean: a scalar function of one point.
        region: the box.
        starts: in the box, (restarts, ...).
        steps: from each start down, and from each up; a step is 2.5 radii over their number.
    """
    step = 2.5 * region.radius / steps
    climb = jax.value_and_grad(mean)

    def one(start: Array, sign: Array) -> tuple[Array, Array]:
        def move(carry: Any, _: None) -> tuple[Any, None]:
            x, best, top = carry
            value, slope = climb(x)
            better = sign * value > top
            best, top = jnp.where(better, x, best), jnp.where(better, sign * value, top)
            x = jnp.clip(x + sign * step * jnp.sign(slope), region.lower, region.upper)
            return (x, best, top), None

        first = (start, start, jnp.asarray(-jnp.inf, start.dtype))
        (_, best, top), _ = jax.lax.scan(move, first, length=steps + 1)
        return best, top

    def side(sign: float) -> Array:
        best, top = jax.vmap(one, (0, None))(starts, jnp.asarray(sign, starts.dtype))
        return best[jnp.argmax(top)]

    return side(-1.0), side(1.0)


def check_reach(columns: Columns, eps: float) -> None:
    """Raises SoundnessError unless every attacked mean, and the clean one, lies in its bounds."""
    inside = columns["attacked_low"] >= columns["lower"]
    inside &= columns["attacked_high"] <= columns["upper"]  # false for NaN too
    inside &= (columns["variance"] >= columns["least"]) & (columns["variance"] <= columns["most"])
    _stop_at(~inside, eps, "lies outside what was certified")


def errors(columns: Columns, y: Vector, eps: float) -> dict[str, Vector]:
    """|mean - y| at every datum: clean, attacked (from below) and certified (from above).

    Raises:
        SoundnessError: unless clean <= attacked <= certified, at every datum.
    """
    y = np.asarray(y, np.float64)
    found = {
        "clean": np.abs(columns["mean"] - y),
        "attacked": np.maximum(columns["attacked_high"] - y, y - columns["attacked_low"]),
        "certified": np.maximum(columns["upper"] - y, y - columns["lower"]),
    }
    ordered = (found["clean"] <= found["attacked"]) & (found["attacked"] <= found["certified"])
    _stop_at(~ordered, eps, "has a larger error than was certified")
    return found


def measure(columns: Columns, data: Split, noise_scale: float, eps: float) -> dict[str, Any]:
    """The numbers of results.json about one posterior on a data set, at one radius.

    Args:
        columns: of `Examine`, on these data at this radius.
        data: with the targets.
        noise_scale: standard deviation of the noise, in those of the target.
        eps: the radius, for messages.

    Raises:
        SoundnessError: as `errors`.
    """
    y = np.asarray(data.y, np.float64)
    found = errors(columns, y, eps)
    sd = np.sqrt(columns["variance"] + noise_scale**2)
    widest, narrowest = (np.sqrt(columns[v] + noise_scale**2) for v in ("most", "least"))
    lower, upper = columns["lower"] - WIDTH * widest, columns["upper"] + WIDTH * widest
    density = -0.5 * np.square((columns["outputs"] - y) / noise_scale) - np.log(
        noise_scale * np.sqrt(2 * np.pi)
    )
    return {
        "log_likelihood": float(np.mean(logsumexp(density, axis=0) - np.log(len(density)))),
        **{f"{name}_rmse": rms(error) for name, error in found.items()},
        "deviation": float(np.sqrt(columns["variance"]).mean()),
        "attacked_half_width": float(
            np.mean(columns["attacked_high"] - columns["attacked_low"]) / 2
        ),
        "certified_half_width": float(np.mean(columns["upper"] - columns["lower"]) / 2),
        "coverage": float(np.mean(found["clean"] <= WIDTH * sd)),
        "covered_everywhere": float(np.mean(found["certified"] <= WIDTH * narrowest)),
        "interval_half_width": float(np.mean(WIDTH * sd)),
        "certified_interval_coverage": float(np.mean((lower <= y) & (y <= upper))),
        "certified_interval_half_width": float(np.mean(upper - lower) / 2),
        "expectation": _expected(columns, y, noise_scale),
    }


def rms(error: Vector) -> float:
    """The root mean square.

    >>> rms(np.array([1.0, -1.0, 5.0]))
    3.0
    """
    return float(np.sqrt(np.mean(np.square(error))))


def _expected(columns: Columns, y: Vector, noise_scale: float) -> dict[str, float] | None:
    """The formal tier beside the exact one; None where the posterior is no factorised Gaussian."""
    if "expected_lower" not in columns:
        return None
    lower, upper = columns["expected_lower"], columns["expected_upper"]
    reach = WIDTH * np.sqrt(np.square(columns["expected_deviation"]) + noise_scale**2)
    return {
        "certified_half_width": float(np.mean(upper - lower) / 2),
        "certified_rmse": rms(np.maximum(upper - y, y - lower)),
        "deviation_upper": float(columns["expected_deviation"].mean()),
        "certified_interval_coverage": float(np.mean((lower - reach <= y) & (y <= upper + reach))),
        "certified_interval_half_width": float(np.mean(upper - lower) / 2 + np.mean(reach)),
    }


def _stop_at(wrong: np.ndarray, eps: float, what: str) -> None:
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise SoundnessError(
            f"the mean at datum {rows[0]}, clean or attacked, {what} at eps {eps:g} "
            f"({len(rows)} data so): a bound or an attack is wrong; please report this with the "
            "run's command and seed"
        )
