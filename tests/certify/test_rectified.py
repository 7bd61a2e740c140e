"""Moments of a rectified Gaussian against numerical integration, from both sides."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bnncert.certify.formal import rectified

T = np.concatenate([np.linspace(-9, 9, 145), [-60.0, -30.0, 30.0, 1e4]])
S = np.array([1e-6, 0.03, 1.0, 40.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_they_enclose_the_exact_moments(dtype, float64):
    m, s = (np.asarray(jnp.asarray(v, dtype), np.float64) for v in (T * S[:, None], S[:, None]))
    t = m / s
    # R = s (phi + t Phi); for t < 0 by scaled tails, which do not cancel
    pdf, cdf = stats.norm.pdf(t), stats.norm.cdf(t)
    mean = np.maximum(s * (pdf + t * cdf), 0)
    square = np.maximum(s * s * ((t * t + 1) * cdf + t * pdf), 0)
    a, b = jnp.asarray(m, dtype), jnp.asarray(s, dtype)
    slack = 1e-15 * (s + np.maximum(m, 0))  # of SciPy's own values
    below, above, second = (
        np.asarray(found(a, b), np.float64)
        for found in (rectified.mean_below, rectified.mean_above, rectified.square_above)
    )
    assert (below <= mean + slack).all() and (mean - slack <= above).all()
    assert (square - slack * (s + np.maximum(m, 0)) <= second).all()
    near = 3e-5 if dtype == jnp.float32 else 1e-13
    np.testing.assert_allclose(above - below, 0, atol=float((near * (s + np.abs(m))).max()))
    assert (above - below <= near * (s + np.maximum(m, 0))).all()


def test_without_spread_it_is_the_relu():
    m, zero = jnp.array([-2.0, 0.0, 3.0]), jnp.zeros(3)
    np.testing.assert_array_equal(rectified.mean_below(m, zero), [0, 0, 3])
    np.testing.assert_allclose(rectified.mean_above(m, zero), [0, 0, 3], rtol=1e-5)
    np.testing.assert_allclose(rectified.square_above(m, zero), [0, 0, 9], rtol=1e-5)
