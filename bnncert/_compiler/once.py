"""Compiling once what is called again and again without `jax.jit`.

A certificate called as it is would be compiled at every call: what it maps over samples is a new
function each time. Here the compiled program is kept for a certificate, its options and a network.

A network is not known by its name: what a function reads besides its arguments, an attribute or a
variable outside, may have changed since, and a kept program would prove something of the old one.
So the function is traced at each call, and a program is used again where it is for *the same
equations*, constants included.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

_KEPT = 32
"""Programs, those used last."""

_LARGEST = 2**20
"""Numbers that a function may close over, which would be kept with its program."""

_RULES = ("jvp_jaxpr_fun", "jvp_fun", "fwd_jaxpr_thunk", "fwd", "bwd")
"""Parameters of custom derivatives, which no value depends on."""


class _Program(NamedTuple):
    traced: core.ClosedJaxpr
    run: Callable[..., Any]


_programs: OrderedDict[Any, list[_Program]] = OrderedDict()
_lock = Lock()


def once(
    f: Callable[..., Any],
    *arrays: Any,
    apply: Callable[..., Any],
    at: tuple[Any, Any],
    **options: Any,
) -> Any:
    """`f(*arrays, apply=apply, **options)`, compiled once for the same equations and shapes.

    Args:
        f: a pure function of the library's own, defined at the top of a module.
        arrays: pytrees of arrays.
        apply: `(params, x) -> outputs` of one network.
        at: the params and the input of one network, as f gives them to apply.
        options: anything else.

    Returns:
        What f returns, a pytree of arrays. Whatever is traced already, or is no array, or cannot be
        hashed, has f called as it is.

    Example:
        >>> double = lambda params, x: params * x
        >>> f = lambda x, apply: apply(2.0, x)
        >>> float(once(f, jnp.ones(()), apply=double, at=(jnp.ones(()), jnp.ones(()))))
        2.0
    """
    program = _program(f, arrays, apply, at, options)
    return f(*arrays, apply=apply, **options) if program is None else program(*arrays)


def _program(
    f: Callable[..., Any], arrays: Any, apply: Callable[..., Any], at: Any, options: dict[str, Any]
) -> Callable[..., Any] | None:
    """The compiled program; None where there is to be none."""
    key = f, tuple(sorted(options.items())), jax.tree.structure(at)
    if not _are_known((arrays, at)) or not _is_hashable(key):
        return None
    try:
        # Of a new function: JAX, too, keeps the trace of one that it has seen.
        traced, shapes = jax.make_jaxpr(lambda *at: apply(*at), return_shape=True)(*at)
    except Exception:  # f meets it as well, and says more of it
        return None
    if not _are_known(traced.consts) or sum(map(np.size, traced.consts)) > _LARGEST:
        return None
    with _lock:
        for program in _programs.get(key, ()):
            if _same(program.traced, traced):
                _programs.move_to_end(key)
                return program.run
    tree = jax.tree.structure(shapes)

    def replayed(params: Any, x: Any) -> Any:
        out = core.jaxpr_as_fun(traced)(*jax.tree.leaves((params, x)))
        return jax.tree.unflatten(tree, out)

    run = jax.jit(lambda *arrays: f(*arrays, apply=replayed, **options))
    with _lock:
        _programs.setdefault(key, []).append(_Program(traced, run))
        _programs.move_to_end(key)
        while sum(map(len, _programs.values())) > _KEPT:
            oldest = next(iter(_programs))
            _programs[oldest].pop(0)
            if not _programs[oldest]:
                del _programs[oldest]
    return run


def _same(a: core.ClosedJaxpr, b: core.ClosedJaxpr) -> bool:
    """Whether two traces are the same equations, with the same constants."""
    if len(a.consts) != len(b.consts) or not all(map(_equal, a.consts, b.consts)):
        return False
    return _same_equations(a.jaxpr, b.jaxpr)


def _same_equations(a: core.Jaxpr, b: core.Jaxpr) -> bool:
    if a is b:
        return True
    of_b: dict[Any, Any] = {}

    def bound(vars_a: Any, vars_b: Any) -> bool:
        """Names the variables of b by those of a."""
        if len(vars_a) != len(vars_b):
            return False
        of_b.update(zip(vars_b, vars_a, strict=True))
        return all(v.aval == w.aval for v, w in zip(vars_a, vars_b, strict=True))

    def same_atom(v: Any, w: Any) -> bool:
        if isinstance(v, core.Literal) or isinstance(w, core.Literal):
            both = isinstance(v, core.Literal) and isinstance(w, core.Literal)
            return both and v.aval == w.aval and _equal(v.val, w.val)
        return of_b.get(w) is v

    def same_atoms(atoms_a: Any, atoms_b: Any) -> bool:
        return len(atoms_a) == len(atoms_b) and all(map(same_atom, atoms_a, atoms_b))

    if len(a.eqns) != len(b.eqns) or not bound(a.constvars, b.constvars):
        return False
    if not bound(a.invars, b.invars):
        return False
    for p, q in zip(a.eqns, b.eqns, strict=True):
        if p.primitive is not q.primitive or not same_atoms(p.invars, q.invars):
            return False
        if not _equal(p.params, q.params) or not bound(p.outvars, q.outvars):
            return False
    return same_atoms(a.outvars, b.outvars)


def _equal(a: Any, b: Any) -> bool:
    """Whether two constants or parameters are the same; False where nobody knows."""
    if a is b:
        return True
    if isinstance(a, core.ClosedJaxpr) and isinstance(b, core.ClosedJaxpr):
        return _same(a, b)
    if isinstance(a, core.Jaxpr) and isinstance(b, core.Jaxpr):
        return _same_equations(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k in _RULES or _equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, (jax.Array, np.ndarray, np.generic)):
        return _same_numbers(a, b)
    if callable(a):
        return False
    return bool(a == b)


def _same_numbers(a: Any, b: Any) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _are_known(arrays: Any) -> bool:
    """Whether these are arrays of a dtype of their own, of which the numbers are known now."""
    made = jnp.zeros((), jnp.float32)  # inside of jit, all that is made is traced
    return all(
        isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        and not isinstance(leaf, Tracer)
        and not jax.typeof(leaf).weak_type
        for leaf in [made, *jax.tree.leaves(arrays)]
    )


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
