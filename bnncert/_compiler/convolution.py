"""Convolutions and their transposes in the forms that XLA's CPU backend runs fast.

`canonical(f)` computes what f computes, with every convolution in another form:

    layout      XLA on CPU brings a convolution to its fast layout (images NHWC, kernels HWIO) only
                outside loops. JAX's transpose of a convolution asks for another kernel layout;
                inside `lax.map` and `lax.scan` it then runs 20 times slower. The transposes are
                made explicit.
    sub-pixels  The transpose of a convolution of stride d reads its image with d - 1 zeros between
                any two pixels, and multiplies them. Along one axis, with n pixels v, taps w, and
                l zeros put before the first pixel, output o is

                    sum_t w[t] v[(o - l + t) / d]                over the t that leave an integer.

                Let o - l = d j - r with 0 <= r < d. Then t = r + d q, and the output is

                    z[j, r] = sum_q w[r + d q] v[j + q],

                an ordinary convolution with d times the features, whose blocks (z[j, d - 1], ...,
                z[j, 0]) are the outputs in their order.
    products    Where few features come out, a convolution has too narrow a matrix to multiply by:
                all taps are multiplied at once, and the products summed where they belong.

Each is the same sum of products in another order.

Source of the sub-pixels: Shi et al., "Is the deconvolution layer the same as a convolutional
layer?", 2016.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p, jit_p
from jaxtyping import Array

_FEW_OUTPUTS = 8  # at most, for products: with more, a convolution was as fast or faster


def canonical(f: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its convolutions in fast forms.

    Args:
        f: a function of pytrees of arrays; wrap what is left *after* differentiation (the result of
            `jax.value_and_grad` or of a vjp).

    Returns:
        A function of the same arguments; it can be vmapped and jitted.

    Example:
        >>> import jax.numpy as jnp
        >>> g = canonical(lambda x: 2 * x)
        >>> float(g(jnp.float32(3.0)))
        6.0
    """

    @wraps(f)
    def replayed(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        if not _convolves(closed.jaxpr):
            return f(*args)
        out = _replay(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return replayed


def _convolves(jaxpr: core.Jaxpr) -> bool:
    return any(
        eqn.primitive is conv_general_dilated_p or any(map(_convolves, _bodies(eqn)))
        for eqn in jaxpr.eqns
    )


def _bodies(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """The jitted bodies that are inlined; any other call is left as it is."""
    body = eqn.params.get("jaxpr") if eqn.primitive is jit_p else None
    return [body.jaxpr] if isinstance(body, core.ClosedJaxpr) else []


def _replay(jaxpr: core.Jaxpr, consts: Any, args: Any) -> list[Array]:
    env: dict[core.Var, Array] = {}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: core.Var | core.Literal) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive is conv_general_dilated_p:
            out = [_convolve(*map(jnp.asarray, values), **eqn.params)]
        elif any(map(_convolves, _bodies(eqn))):
            closed = eqn.params["jaxpr"]
            out = _replay(closed.jaxpr, closed.consts, values)
        else:
            result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            out = result if eqn.primitive.multiple_results else [result]
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _convolve(x: Array, kernel: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    lhs, rhs, out = dimension_numbers
    rank = x.ndim
    # A spec lists where (batch or output feature, feature, *spatial) stand.
    image = (0, rank - 1, *range(1, rank - 1))
    filters = (rank - 1, rank - 2, *range(rank - 2))
    x = x.transpose(_order(lhs, image))
    kernel = kernel.transpose(_order(rhs, filters))
    numbers = jax.lax.ConvDimensionNumbers(image, filters, image)
    params = {**params, "dimension_numbers": numbers}
    axes = _split(x.shape[1:-1], kernel.shape[:-2], params)
    if _has_few_products(x, kernel, axes, params):
        y = _by_products(x, kernel, axes, params)
    elif any(axis.dilation > 1 for axis in axes):
        y = _by_sub_pixels(x, kernel, axes, params)
    else:
        y = conv_general_dilated_p.bind(x, kernel, **params)
    return y.transpose(_order(image, out))


def _order(source: Any, target: Any) -> tuple[int, ...]:
    """The permutation that takes an array of one spec to another."""
    order = [0] * len(source)
    for where, place in zip(source, target, strict=True):
        order[place] = where
    return tuple(order)


class _Axis(NamedTuple):
    """One spatial axis of a convolution, its outputs in blocks of `dilation`.

    Attributes:
        dilation: d of the module's docstring.
        phases: how many of the d outputs of a block are not identically zero.
        taps: of the ordinary convolution (the range of q).
        padding: of the ordinary convolution.
        start: of the outputs, in the first block.
        size: number of outputs.
    """

    dilation: int
    phases: int
    taps: int
    padding: tuple[int, int]
    start: int
    size: int


def _split(pixels: Sequence[int], taps: Sequence[int], params: dict[str, Any]) -> tuple[_Axis, ...]:
    """The axes of a convolution that can be split; none where it is to stay as it is."""
    names = ("window_strides", "lhs_dilation", "rhs_dilation", "padding")
    found = []
    for n, k, stride, d, e, (low, high) in zip(
        pixels, taps, *(params[name] for name in names), strict=True
    ):
        size = d * (n - 1) + 1 + low + high - (k - 1)
        if d == 1:
            found.append(_Axis(1, 1, k, (low, high), 0, -(-size // stride)))
            continue
        if stride > 1 or e > 1 or min(n, k, size) < 1:
            return ()
        first, last = -(low // d), -((low + 1 - size) // d)
        depth = -(-k // d)
        padding = (-first, last + depth - n)
        found.append(_Axis(d, min(k, d), depth, padding, d - 1 - low - d * first, size))
    return tuple(found)


def _has_few_products(
    x: Array, kernel: Array, axes: tuple[_Axis, ...], params: dict[str, Any]
) -> bool:
    """Whether the products of all taps take hardly more room than the image."""
    *taps, inputs, outputs = kernel.shape
    simple = all(
        factor == 1
        for factor in (
            *params["window_strides"],
            *params["rhs_dilation"],
            params["feature_group_count"],
            params["batch_group_count"],
        )
    )
    few = 1 < math.prod(taps) * outputs <= 4 * inputs and outputs <= _FEW_OUTPUTS
    return bool(axes) and simple and few and x.size > 0 and x.dtype.itemsize >= 4


def _by_sub_pixels(
    x: Array, kernel: Array, axes: tuple[_Axis, ...], params: dict[str, Any]
) -> Array:
    groups = params["feature_group_count"] * params["batch_group_count"]
    kernel = _phases(kernel, axes, groups)
    split = kernel.shape[len(axes) + 1 :]
    ordinary = {
        **params,
        "lhs_dilation": (1,) * len(axes),
        "padding": tuple(axis.padding for axis in axes),
    }
    flat = kernel.reshape(*kernel.shape[: len(axes) + 1], -1)
    z = conv_general_dilated_p.bind(x, flat, **ordinary)
    return _interleave(z.reshape(*z.shape[:-1], *split), axes)


def _by_products(x: Array, kernel: Array, axes: tuple[_Axis, ...], params: dict[str, Any]) -> Array:
    rank = len(axes)
    kernel = _phases(kernel, axes, 1)
    products = jax.lax.dot_general(
        x,
        kernel,
        (((rank + 1,), (rank,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    zero = jnp.zeros((), products.dtype)
    summed: Any = 0.0
    for tap in itertools.product(*(range(axis.taps) for axis in axes)):
        # The product of tap q and pixel i belongs to block i - q.
        moved = [
            (axis.padding[0] - q, axis.padding[1] - (axis.taps - 1 - q), 0)
            for axis, q in zip(axes, tap, strict=True)
        ]
        product = products[(slice(None),) * (rank + 1) + tap]
        still = [(0, 0, 0)] * (rank + 2)
        summed = summed + jax.lax.pad(product, zero, [(0, 0, 0), *moved, *still])
    return _interleave(summed, axes)


def _phases(kernel: Array, axes: tuple[_Axis, ...], groups: int) -> Array:
    """Taps w[r + d q], features last: (*q, input, group, *r from the last to the first, output)."""
    *taps, inputs, outputs = kernel.shape
    rank = len(axes)
    fill = [(0, axis.taps * axis.phases - k) for axis, k in zip(axes, taps, strict=True)]
    kernel = jnp.pad(kernel, [*fill, (0, 0), (0, 0)])
    split = [size for axis in axes for size in (axis.taps, axis.phases)]
    kernel = kernel.reshape(*split, inputs, groups, outputs // groups)
    kernel = jnp.flip(kernel, [2 * i + 1 for i in range(rank)])
    blocks, phases = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    return kernel.transpose(*blocks, 2 * rank, 2 * rank + 1, *phases, 2 * rank + 2)


def _interleave(z: Array, axes: tuple[_Axis, ...]) -> Array:
    """Blocks (batch, *block, group, *phase, output) as an image."""
    rank = len(axes)
    absent = [(axis.dilation - axis.phases, 0) for axis in axes]
    if any(low for low, _ in absent):
        z = jnp.pad(z, [*[(0, 0)] * (rank + 2), *absent, (0, 0)])
    pairs = [i for axis in range(rank) for i in (1 + axis, rank + 2 + axis)]
    z = z.transpose(0, *pairs, rank + 1, 2 * rank + 2)
    batch, *blocks, groups, outputs = z.shape
    sizes = [blocks[i] * blocks[i + 1] for i in range(0, 2 * rank, 2)]
    z = z.reshape(batch, *sizes, groups * outputs)
    inside = (slice(axis.start, axis.start + axis.size) for axis in axes)
    return z[(slice(None), *inside)]
