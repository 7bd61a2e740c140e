import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.setup.schedule import (
    kl_weight_schedule,
    learning_rate_schedule,
    power_schedule,
    threat_schedule,
)
from experiments.setup.settings import TrainConfig

TRAIN = TrainConfig(epochs=10, eps=0.2, lam=0.25, warmup=0.1, ramp=0.5)


def curve(train: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    at = threat_schedule(train, steps_per_epoch=10)
    eps, lam = zip(*(at(step) for step in range(101)), strict=True)
    return np.array(eps), np.array(lam)


def test_eps_and_lam_are_piecewise_linear() -> None:
    eps, lam = curve(TRAIN)
    along = np.clip((np.arange(101) - 10) / 50, 0, 1)
    np.testing.assert_allclose(eps, 0.2 * along, atol=1e-6)
    np.testing.assert_allclose(lam, 1 - 0.75 * along, atol=1e-6)


def test_no_ramp_is_a_step_and_not_an_ordinary_network_for_ever() -> None:
    eps, lam = curve(dataclasses.replace(TRAIN, warmup=0.3, ramp=0.0))
    assert eps[30] == 0
    np.testing.assert_allclose(eps[31:], 0.2, rtol=1e-6)
    np.testing.assert_allclose(lam[31:], 0.25, rtol=1e-6)


def test_lam_one_stays_one() -> None:
    _, lam = curve(dataclasses.replace(TRAIN, lam=1.0))
    assert (lam == 1.0).all()


def test_power_goes_up_after_eps_is_there() -> None:
    train = dataclasses.replace(TRAIN, power=0.8, power_ramp=0.2)
    at = power_schedule(train, steps_per_epoch=10)
    power = np.array([at(step) for step in range(101)])
    eps, _ = curve(train)
    np.testing.assert_allclose(power, 0.8 * np.clip((np.arange(101) - 60) / 20, 0, 1), atol=1e-6)
    assert (eps[power > 0] == eps[-1]).all()


def test_the_kl_weight_goes_up_to_the_one_that_is_reported() -> None:
    train = dataclasses.replace(TRAIN, kl_weight=0.4, kl_ramp=0.5)
    at = kl_weight_schedule(train, steps_per_epoch=10)
    assert callable(at)
    weight = np.array([at(step) for step in range(101)])
    np.testing.assert_allclose(weight, 0.04 + 0.36 * np.clip(np.arange(101) / 50, 0, 1), rtol=1e-6)
    assert weight[-1] == np.float32(0.4)


def test_without_their_ramps_power_and_kl_weight_are_constants() -> None:
    train = dataclasses.replace(TRAIN, power=0.8, kl_weight=0.4)
    assert kl_weight_schedule(train, 10) == 0.4
    assert {float(power_schedule(train, 10)(step)) for step in (0, 50, 99)} == {
        float(np.float32(0.8))
    }


def test_a_traced_step_gives_what_a_python_step_does() -> None:
    at = threat_schedule(TRAIN, steps_per_epoch=10)
    for step in (0, 10, 33, 99):
        eager, traced = at(step), jax.jit(at)(jnp.int32(step))
        np.testing.assert_allclose(eager, traced, rtol=1e-6)
        assert all(value.dtype == jnp.float32 and value.shape == () for value in eager)
    ramped = dataclasses.replace(TRAIN, power=0.8, power_ramp=0.3, kl_ramp=0.4)
    for schedule in (power_schedule(ramped, 10), kl_weight_schedule(ramped, 10)):
        assert callable(schedule)
        for step in (0, 33, 75):
            eager, traced = schedule(step), jax.jit(schedule)(jnp.int32(step))
            np.testing.assert_allclose(eager, traced, rtol=1e-6)
            assert eager.dtype == jnp.float32 and eager.shape == ()


def test_the_learning_rate_drops_where_it_says() -> None:
    train = TrainConfig(
        epochs=10, learning_rate=1.0, learning_rate_drops=(0.75, 0.9), learning_rate_decay=0.2
    )
    at = learning_rate_schedule(train, steps_per_epoch=10)
    rates = [float(at(step)) for step in (0, 74, 75, 89, 90, 99)]  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(rates, [1, 1, 0.2, 0.2, 0.04, 0.04], rtol=1e-6)


@pytest.mark.parametrize(("drops", "last"), [((), 1.0), ((0.75, 0.9), 0.04)])
def test_a_short_run_has_every_drop(drops: tuple[float, ...], last: float) -> None:
    """0.75 and 0.9 of three steps round to 2 and 3, and of one step both to 1."""
    train = TrainConfig(
        epochs=1, learning_rate=1.0, learning_rate_drops=drops, learning_rate_decay=0.2
    )
    for steps in (1, 3):
        rate = learning_rate_schedule(train, steps)(steps)
        np.testing.assert_allclose(rate, last, rtol=1e-6)
