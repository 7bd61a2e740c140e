"""`widths` tells what `bound` finds on the way, and which operation made it wide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnncert as bc
from bnncert.bounds import Width, Widths, widths

W = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.8, -1.0]])
X = jnp.array([0.2, -0.4, 0.6])


def f(w, x):
    hidden = jax.nn.relu(w @ x)
    return (hidden + 0.1) @ jnp.array([2.0, -1.0])


@pytest.mark.parametrize("method", ["ibp", "forward", "crown"])
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_the_last_row_is_the_width_of_the_bound(method: str, rounding: str) -> None:
    found = widths(f, method, rounding=rounding)(W, bc.ball(X, 0.3))
    box = bc.bound(f, method, rounding=rounding)(W, bc.ball(X, 0.3))
    last = found.rows[-1]
    np.testing.assert_allclose(last.largest, float(box.upper - box.lower), rtol=1e-5)
    assert last.shape == () and last.median == last.largest
    first = found.rows[0]
    assert (first.op, first.shape, first.growth) == ("input", (3,), None)
    np.testing.assert_allclose((first.largest, first.median), 0.6, rtol=1e-5)


def test_every_value_stays_within_its_width() -> None:
    """Of the values on the way, at 400 points and the corners."""

    def values(x):
        inner = W @ x
        hidden = jax.nn.relu(inner)
        return inner, hidden, hidden * hidden

    found = widths(values, "ibp")(bc.ball(X, 0.3))
    points = X + 0.3 * jax.random.uniform(jax.random.key(0), (400, 3), minval=-1.0)
    corners = X + 0.3 * (2.0 * jnp.indices((2, 2, 2)).reshape(3, -1).T - 1.0)
    reached = jax.vmap(values)(jnp.concatenate([points, corners]))
    assert len(found.rows) == 4
    for row, value in zip(found.rows[1:], reached, strict=True):
        spans = value.max(0) - value.min(0)
        assert row.largest >= spans.max() - 1e-6
        assert row.median >= jnp.median(spans) - 1e-6
    # The corners reach all that an affine map may: its width is tight.
    np.testing.assert_allclose(found.rows[1].largest, 0.6 * 3.5, rtol=1e-5)


def test_the_operation_that_widens_is_found_with_its_line() -> None:
    def network(x):
        y = jnp.tanh(W @ x)
        y = 50.0 * y  # here
        return jnp.tanh(y)

    rows = widths(network, "ibp")(bc.ball(X, 0.1)).rows
    worst = max(rows, key=lambda row: row.growth or 0.0)
    assert worst.op == "mul" and worst.growth == pytest.approx(50.0)
    line = network.__code__.co_firstlineno + 2
    assert f"test_widening.py:{line}" in worst.source
    assert rows[worst.operands[0]].op == "tanh"


def test_what_intervals_forget_is_narrow_by_crown() -> None:
    def difference(x):
        y = jnp.tanh(x)
        return y - 0.9 * y

    box = bc.Box(-jnp.ones(1), jnp.ones(1))
    by_ibp, by_crown = (widths(difference, m)(box).rows for m in ("ibp", "crown"))
    assert [row.op for row in by_ibp] == [row.op for row in by_crown]
    assert by_crown[-1].largest <= by_ibp[-1].largest
    assert by_ibp[-1].operands == (1, 2)
    assert by_ibp[-1].growth == pytest.approx(by_ibp[-1].largest / by_ibp[1].largest)


def test_a_width_that_is_not_known_is_infinite() -> None:
    rows = widths(lambda x: 2.0 * jnp.log(x), "ibp")(bc.Box(-jnp.ones(2), jnp.ones(2))).rows
    assert [row.op for row in rows] == ["input", "log", "mul"]
    assert [row.largest for row in rows] == [2.0, np.inf, np.inf]
    assert rows[1].growth == np.inf and rows[2].growth == 1.0  # what follows is not to blame


def test_a_point_has_no_width() -> None:
    rows = widths(f, "ibp")(W, bc.Box(X, X)).rows
    assert all(row.largest == row.median == 0.0 for row in rows)
    assert all(row.growth == 1.0 for row in rows[1:])


def test_weights_and_empty_values_have_rows_too() -> None:
    regions = bc.Box(W - 0.1, W + 0.1), bc.ball(X, 0.1)
    rows = widths(lambda w, x: (w @ x, x[:0]), "ibp")(*regions).rows
    assert [row.op for row in rows[:2]] == ["input", "input"]
    assert [row.source for row in rows[:2]] == ["argument leaf 0", "argument leaf 1"]
    product = next(row for row in rows if row.op == "dot_general")
    assert product.operands == (0, 1)
    assert next(row for row in rows if row.shape == (0,)).largest == 0.0


def test_the_table_is_aligned() -> None:
    rows = (
        Width("input", (3,), (), "argument leaf 0", 0.2, 0.2, None),
        Width("dot_general", (512, 3), (0,), "/home/me/model.py:12 (apply)", 1234.5, 0.1, 6172.5),
        Width("add", (512, 3), (0, 1), "", np.inf, np.inf, np.inf),
    )
    head, *lines = str(Widths(rows)).splitlines()
    assert len(lines) == 3
    for title in ("op", "shape", "of"):  # what is read from the left
        assert all(line[head.index(title) - 1] == " " for line in lines)
        assert all(line[head.index(title)] != " " for line in lines[1:])
    for title in ("largest", "median", "growth"):  # numbers, from the right
        end = head.index(title) + len(title)
        assert all(line[end - 1] != " " for line in lines[1:])
    assert lines[1].endswith("model.py:12 (apply)") and "/home" not in lines[1]
    assert "1.23e+03" in lines[1] and "inf" in lines[2]


def test_widths_are_numbers_and_not_traced() -> None:
    region = bc.ball(X, 0.1)
    for transform in (
        lambda: jax.jit(lambda box: widths(f, "ibp")(W, box).rows[0].largest)(region),
        lambda: jax.vmap(lambda w: widths(f, "ibp")(w, region).rows[0].largest)(W[None]),
    ):
        with pytest.raises(ValueError, match="outside of them"):
            transform()


def test_wrong_arguments_are_refused_as_by_bound() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        widths(f, "corwn")
    with pytest.raises(ValueError, match="batch_size = 0"):
        widths(f, batch_size=0)
    with pytest.raises(ValueError, match="no set among the arguments"):
        widths(f)(W, X)
    with pytest.raises(bc.UnsupportedPrimitiveError):
        widths(lambda x: jax.lax.digamma(x))(bc.ball(X, 0.1))
