"""Parameters of primitives that the rules know, and the values of them they hold for.

A parameter may change what a primitive computes: `scatter` moves values, unless its `update_jaxpr`
computes others. So a rule holds for the parameters of this table alone. What else a primitive is
bound with is refused, but for None: that is how JAX says that a parameter has no effect.

    ANY    the rule evaluates the primitive with its parameters, whatever they are; or they say
           where a value is kept, or how it is differentiated, and not what it is
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from bnncert.bounds.graph.primitives import is_jax_own
from bnncert.bounds.tracing.windows import empty_window


class Parameter(NamedTuple):
    """What is known of one parameter.

    Attributes:
        holds: `(value, equation) -> bool`: whether the rules hold for it.
        instead: what to write where they do not.
    """

    holds: Callable[[Any, core.JaxprEqn], bool]
    instead: str = "Leave it at its default, or compute this where no set reaches."


def refusal(eqn: core.JaxprEqn) -> str:
    """Why an equation is not what the rules know under its primitive's name; empty where it is."""
    name = eqn.primitive.name
    known = PARAMETERS.get(name)
    if known is None:
        return ""
    if not is_jax_own(eqn.primitive):
        return (
            f"this '{name}' is not JAX's own primitive, which the rules are for, but another of "
            "its name. Write it with JAX's operations, or give it a name of its own."
        )
    for parameter, value in eqn.params.items():
        if parameter in known:
            holds, instead = known[parameter]
            if not holds(value, eqn):
                return f"{parameter} = {_short(value)} has no bound rule. {instead}"
        elif value is not None and known is not _CALL:
            return f"{parameter} = {_short(value)} is not known to the rules. {ANY.instead}"
    return ""


def _aval(atom: Any) -> Any:
    return atom.aval


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _any(value: Any, eqn: core.JaxprEqn) -> bool:
    return True


def _nothing(value: Any, eqn: core.JaxprEqn) -> bool:
    return value is None or value == ()


def _is_mode(value: Any, eqn: core.JaxprEqn) -> bool:
    return isinstance(value, jax.lax.GatherScatterMode) and value in _MODES


def _is_default(value: Any, eqn: core.JaxprEqn) -> bool:
    """No tolerance: the errors of functions are those that JAX's own choice makes."""
    return value is None or value in (
        jax.lax.AccuracyMode.DEFAULT,
        jax.lax.AccuracyMode.HIGHEST,
    )


def _is_bounded_format(value: Any, eqn: core.JaxprEqn) -> bool:
    """Other formats have no infinity (float8) or no order (complex)."""
    return value is None or jnp.dtype(value) in map(jnp.dtype, _FORMATS)


def _is_bounded_format_or_jumps(value: Any, eqn: core.JaxprEqn) -> bool:
    """Integers and truth values are left to the rule, which refuses them where they are needed."""
    return _is_bounded_format(value, eqn) or not jnp.issubdtype(value, jnp.inexact)


def _is_no_narrower(value: Any, eqn: core.JaxprEqn) -> bool:
    return value is None or (
        _is_bounded_format(value, eqn)
        and all(jnp.promote_types(_aval(v).dtype, value) == value for v in eqn.invars)
    )


def _adds(value: Any, eqn: core.JaxprEqn) -> bool:
    """The sum of the value there and the update."""
    if not isinstance(value, core.Jaxpr) or len(value.eqns) != 1:
        return False
    (eqn,) = value.eqns
    return (
        eqn.primitive.name == "add"
        and is_jax_own(eqn.primitive)
        and list(eqn.invars) == list(value.invars)
        and list(eqn.outvars) == list(value.outvars)
    )


def _leaves_no_window_empty(value: Any, eqn: core.JaxprEqn) -> bool:
    return empty_window(_aval(eqn.invars[0]).shape, eqn.params) is None


_MODES = (
    jax.lax.GatherScatterMode.CLIP,
    jax.lax.GatherScatterMode.FILL_OR_DROP,
    jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)
_FORMATS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)

ANY = Parameter(_any)
_ACCURACY = Parameter(_is_default, "Leave `accuracy` out.")
_MODE = Parameter(_is_mode, 'Give mode "clip", "fill", "drop" or "promise_in_bounds".')
_DTYPE = Parameter(
    _is_bounded_format_or_jumps, "Bounded are float16, bfloat16, float32 and float64."
)
_OUT_DTYPE = Parameter(
    _is_no_narrower,
    "Bounded is a result no narrower than the operands: cast it with `astype` afterwards.",
)
_OWN_DTYPE = Parameter(_nothing, "Cast the operands with `astype` before.")
_NO_FUNCTION = Parameter(
    _nothing, "x.at[i].apply(f) is bounded where it is written x.at[i].set(f(x[i]))."
)
_SUM = Parameter(_adds, "Bounded is a sum: x.at[i].add(v).")
_PADDING = Parameter(
    _leaves_no_window_empty,
    "A window lies wholly in the padding or in the holes of base_dilation: the largest of no value "
    "is -inf, the smallest inf. Give less padding, or larger windows.",
)

_ONE_ARRAY = Parameter(
    lambda value, eqn: len(eqn.invars) == 1,
    "Bounded is the sorting of one array: what is sorted along with it (jnp.argsort, a key and its "
    "values) jumps where two values change places.",
)

_PLACED = {"sharding": ANY}
_INDEXED = {
    "dimension_numbers": ANY,
    "indices_are_sorted": ANY,
    "unique_indices": ANY,
    "mode": _MODE,
}
_PRODUCT = {
    "dimension_numbers": ANY,
    "precision": ANY,
    "preferred_element_type": _OUT_DTYPE,
    "out_sharding": ANY,
}
_WINDOW = {
    "window_dimensions": ANY,
    "window_strides": ANY,
    "padding": ANY,
    "base_dilation": ANY,
    "window_dilation": ANY,
}
_REDUCED = {"axes": ANY, "out_sharding": ANY}
_ALONG = {"axis": ANY, "reverse": ANY}

_CALL: Mapping[str, Parameter] = {}
"""A call is inlined: what it computes is its body, whatever its other parameters."""


def _each(names: str, known: Mapping[str, Parameter]) -> dict[str, Mapping[str, Parameter]]:
    return dict.fromkeys(names.split(), known)


PARAMETERS: Mapping[str, Mapping[str, Parameter]] = {
    **_each("abs add add_any asinh atan ceil clamp copy copy_p div", {}),
    **_each("dynamic_update_slice eq erf floor ge gt le lt max min ne neg", {}),
    **_each("optimization_barrier pow select_n sign sinh square stop_gradient sub", {}),
    **_each("cbrt cos erfc exp exp2 expm1 log log1p", {"accuracy": _ACCURACY}),
    **_each("logistic rsqrt sin sqrt tanh", {"accuracy": _ACCURACY}),
    **_each("acos acosh asin atanh cosh digamma erf_inv lgamma tan", {"accuracy": _ACCURACY}),
    **_each("cummax cummin cumlogsumexp cumprod cumsum", _ALONG),
    **_each("reduce_max reduce_min reduce_prod reduce_sum", _REDUCED),
    **_each("reduce_window_max reduce_window_min", {**_WINDOW, "padding": _PADDING}),
    "reduce_window_sum": _WINDOW,
    **_each("jit pjit closed_call core_call remat2 checkpoint", _CALL),
    **_each("custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr", _CALL),
    "broadcast_in_dim": {"shape": ANY, "broadcast_dimensions": ANY, **_PLACED},
    "concatenate": {"dimension": ANY},
    "conv_general_dilated": {
        **_PRODUCT,
        "window_strides": ANY,
        "padding": ANY,
        "lhs_dilation": ANY,
        "rhs_dilation": ANY,
        "feature_group_count": ANY,
        "batch_group_count": ANY,
    },
    "convert_element_type": {"new_dtype": _DTYPE, "weak_type": ANY, **_PLACED},
    "dot_general": _PRODUCT,
    "dynamic_slice": {"slice_sizes": ANY},
    "expand_dims": {"dimensions": ANY},
    "gather": {**_INDEXED, "slice_sizes": ANY, "fill_value": ANY},
    "integer_pow": {"y": ANY},
    "mul": {"out_dtype": _OWN_DTYPE},
    "name": {"name": ANY},
    "pad": {"padding_config": ANY},
    "reshape": {"new_sizes": ANY, "dimensions": Parameter(_nothing), **_PLACED},
    "pvary": {"axes": ANY},
    "rev": {"dimensions": ANY},
    "round": {"rounding_method": ANY},
    "scatter": {**_INDEXED, "update_jaxpr": _NO_FUNCTION, "update_consts": _NO_FUNCTION},
    "scatter-add": {**_INDEXED, "update_jaxpr": _SUM, "update_consts": _NO_FUNCTION},
    "sharding_constraint": {
        **_PLACED,
        "layout": ANY,
        "context_mesh": ANY,
        "unconstrained_dims": ANY,
    },
    "sort": {"dimension": ANY, "is_stable": ANY, "num_keys": _ONE_ARRAY},
    "top_k": {"k": ANY, "operand": ANY, "axis": ANY, "is_stable": ANY, "out_sharding": ANY},
    "slice": {"start_indices": ANY, "limit_indices": ANY, "strides": ANY},
    "split": {"sizes": ANY, "axis": ANY},
    "squeeze": {"dimensions": ANY},
    "stack": {"axis": ANY},
    "tile": {"reps": ANY},
    "transpose": {"permutation": ANY},
    "unstack": {"axis": ANY},
    # Operations that are recognised or rewritten to, and no primitives of JAX.
    **_each("celu clip elu gelu gelu_tanh hard_silu hard_tanh leaky_relu log_sigmoid", {}),
    **_each("log_softmax logaddexp logsumexp mish normalise reciprocal selu silu soft_sign", {}),
    **_each("softmax softplus squareplus windows", {}),
}
"""By primitive, and by parameter."""
