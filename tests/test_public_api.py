"""The names and signatures that code outside this project calls."""

import importlib
import inspect
import pkgutil
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import bnncert as bc

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(bc.__path__, "bnncert.") if "._" not in info.name
)

_DOORS: list[Any] = [getattr(bc.infer, name) for name in bc.infer.__all__]
METHODS = [m for m in _DOORS if inspect.ismodule(m) and hasattr(m, "build")]
METHODS.remove(bc.infer.ensemble)  # it is one of others
OPTIMIZED = [
    m
    for m in METHODS
    if "optimizer" in inspect.signature(m.build).parameters and m is not bc.infer.guide
]

pytestmark = pytest.mark.smoke


def parameters(f) -> tuple[str, ...]:
    """Names in order, with a "*" before the keyword-only ones, as in the source."""
    names, starred = [], False
    for name, parameter in inspect.signature(f).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            names, starred = [*names, "*"], True
        names.append("**" + name if parameter.kind is inspect.Parameter.VAR_KEYWORD else name)
    return tuple(names)


def starts_with(f, *expected: str) -> bool:
    return parameters(f)[: len(expected)] == expected


def test_sets():
    assert starts_with(bc.Box, "lower", "upper")
    assert starts_with(bc.LpBall, "center", "eps", "p")
    assert starts_with(bc.ball, "x", "eps", "*", "p", "clip")
    defaults = inspect.signature(bc.ball).parameters
    assert defaults["p"].default == jnp.inf and defaults["clip"].default is None
    box = bc.Box(jnp.zeros(2), jnp.ones(2))
    assert jax.tree.structure(box).num_leaves == 2
    assert jax.tree.structure(bc.LpBall(jnp.zeros(2), 0.1, 2)).num_leaves == 2  # p is static


def test_bounds():
    assert starts_with(bc.bound, "f", "method", "*")
    options = inspect.signature(bc.bound).parameters
    assert options["method"].default == "crown-ibp"
    assert options["rounding"].default == "nearest"
    assert bc.CROWN().lower_slope == "adaptive" and "batch_size" in options
    assert starts_with(bc.linear_bounds, "f", "method", "*")
    assert inspect.signature(bc.linear_bounds).parameters["method"].default == "crown"
    assert starts_with(bc.ibp, "f") and starts_with(bc.crown, "f")
    found = bc.linear_bounds(lambda x: 2 * x)(bc.Box(jnp.zeros(2), jnp.ones(2)))
    assert isinstance(found, bc.LinearBounds) and isinstance(found.lower, bc.Affine)
    assert bc.LinearBounds._fields == ("lower", "upper") and bc.Affine._fields == ("A", "b")
    assert issubclass(bc.UnsupportedPrimitiveError, NotImplementedError)


def test_likelihoods():
    assert bc.likelihood.Threat is bc.Threat
    assert bc.Threat._fields == ("eps", "lam", "power")
    for robust in (bc.likelihood.robust_categorical, bc.likelihood.robust_gaussian):
        assert starts_with(robust, "apply", "*") and robust is not None
        assert inspect.signature(robust).parameters["method"].default == "ibp"
    assert "clip" in parameters(bc.likelihood.robust_categorical)
    assert "noise_scale" in parameters(bc.likelihood.robust_gaussian)
    loglik = bc.likelihood.robust_categorical(lambda w, x: w @ x)
    assert parameters(loglik) == ("key", "params", "x", "y", "threat")


def test_inference_has_one_anatomy():
    assert bc.Algorithm._fields == ("init", "update", "posterior")
    assert bc.Batch._fields == ("x", "y", "mask")
    assert starts_with(bc.infer.ensemble.build, "algorithm", "num_members", "*", "vectorize")
    for module in METHODS:
        # These are given all the data, and so their number.
        full_batch = module in (bc.infer.mcmc, bc.infer.hmc, bc.infer.nuts)
        own = ("make",) if module is bc.infer.guide else ()
        assert starts_with(module.build, "log_likelihood", "prior", *own, "*")
        assert ("num_data" in parameters(module.build)) is not full_batch
        assert "prepare" in parameters(module.build)
    assert bc.infer.mcmc.Sampler._fields == ("sample",)
    prior = {"w": bc.prior.normal({"w": jnp.zeros(2)})["w"]}
    import optax

    for module in OPTIMIZED:
        algorithm: Any = module.build(
            bc.likelihood.clean_categorical(lambda p, x: p["w"] * x),
            prior,
            num_data=10,
            optimizer=optax.sgd(0.1),
        )
        assert isinstance(algorithm, bc.Algorithm)
        q = algorithm.posterior(algorithm.init(jax.random.key(0), {"w": jnp.ones(2)}))
        assert isinstance(q, bc.types.Posterior)
        assert q.sample(jax.random.key(0), 1)["w"].shape == (1, 2)


def test_certificates_and_attacks():
    assert starts_with(bc.certify.decision, "apply", "samples", "x_set", "*")
    assert starts_with(bc.certify.predictive, "apply", "samples", "x_set", "*")
    for certify in (bc.certify.decision, bc.certify.predictive):
        assert {"method", "rounding", "batch_size"} <= set(parameters(certify))
    fields = ("predicted", "robust", "margins", "probability", "confidence", "arithmetic")
    assert starts_with(bc.certify.Decision, *fields)
    common = ("key", "apply", "posterior", "x_set", "constraints", "*")
    assert starts_with(bc.certify.safety, *common)
    assert {"method", "rounding", "num_boxes"} <= set(parameters(bc.certify.safety))
    assert starts_with(bc.certify.radius, "apply", "samples", "x", "*")
    assert starts_with(bc.certify.statistical, "key", "apply", "posterior", "x_set", "*")
    assert bc.certify.Safety._fields[:4] == ("lower", "upper", "safe", "unsafe")
    assert starts_with(bc.attack.pgd, "key", "apply", "samples", "x", "y", "eps", "*")
    assert starts_with(bc.attack.fgsm, "apply", "samples", "x", "y", "eps", "*")
    attacks = bc.attack
    for one in (attacks.apgd, attacks.targeted_apgd, attacks.square, attacks.strongest):
        assert starts_with(one, "key", "apply", "samples", "x", "y", "eps", "*")
    assert starts_with(bc.attack.transfer, "apply", "samples", "candidates", "y", "*")
    assert bc.attack.AttackResult._fields == ("x", "predicted", "broken", "margin")


def test_the_front_door_lists_what_it_has():
    found = {
        name
        for name, value in vars(bc).items()
        if not name.startswith("_") and (not inspect.ismodule(value) or "bnncert" in value.__name__)
    }
    assert set(bc.__all__) == found
    assert list(bc.__all__) == sorted(bc.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public)


def test_it_says_that_it_is_typed():
    assert (ROOT / "bnncert" / "py.typed").exists()


def public_functions() -> list:
    """Every function that a front door exports, and those of the modules it names."""
    doors = [bc, *(getattr(bc, name) for name in bc.__all__ if inspect.ismodule(getattr(bc, name)))]
    doors += [*METHODS, bc.infer.ensemble]
    found = {}
    for door in doors:
        names = getattr(door, "__all__", [n for n in vars(door) if not n.startswith("_")])
        for name in names:
            value = getattr(door, name)
            if inspect.isfunction(value) and value.__module__.startswith("bnncert"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return [pytest.param(value, id=name) for name, value in sorted(found.items())]


@pytest.mark.parametrize("f", public_functions())
def test_every_public_function_is_documented_and_typed(f):
    doc = inspect.getdoc(f)
    assert doc and doc.splitlines()[0].strip()
    signature = inspect.signature(f)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name


@pytest.mark.parametrize(
    "f",
    [
        bc.ball,
        bc.bound,
        bc.linear_bounds,
        bc.likelihood.continuous_threat,
        bc.likelihood.clean_categorical,
        bc.likelihood.robust_categorical,
        bc.likelihood.certified_categorical,
        bc.likelihood.attacked_categorical,
        bc.likelihood.robust_gaussian,
        bc.likelihood.quantile_categorical,
        bc.likelihood.quantile_gaussian,
        *(module.build for module in METHODS),
        bc.infer.ensemble.build,
        bc.certify.decision,
        bc.certify.predictive,
        bc.certify.safety,
        bc.certify.class_stays,
        bc.certify.outputs_within,
        bc.certify.statistical,
        bc.certify.sampled_safety,
        bc.certify.proves_class,
        bc.certify.proves_outputs,
        bc.certify.radius,
        bc.certify.statistical_radius,
        bc.certify.attacked_radius,
        bc.certify.uncertainty,
        bc.certify.mean_and_variance,
        bc.attack.pgd,
        bc.attack.fgsm,
        bc.attack.apgd,
        bc.attack.targeted_apgd,
        bc.attack.square,
        bc.attack.strongest,
        bc.attack.battery,
        bc.attack.transfer,
        bc.prior.normal,
    ],
    ids=lambda f: f"{f.__module__}.{f.__qualname__}",
)
def test_the_contract_documents_each_argument(f):
    doc = inspect.getdoc(f) or ""
    assert "Args:" in doc and "Returns:" in doc
    for name in inspect.signature(f).parameters:
        assert f"\n    {name}: " in doc, f"{f.__qualname__} does not document {name}"


def test_the_wheel_installs_one_package():
    """A top-level `experiments` in everybody's site-packages would hide their own."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == ["bnncert", "experiments"]
    assert wheel["sources"] == {"experiments": "bnncert/experiments"}  # the commands go inside


def test_methods_and_arithmetics_are_values():
    """They compare, are hashed, and so are static arguments under `jit`."""
    for kind in (bc.IBP, bc.Forward, bc.CROWNIBP, bc.CROWN, bc.AlphaCROWN, bc.Real, bc.Float):
        assert kind() == kind() and hash(kind()) == hash(kind())
    assert bc.CROWN(lower_slope="zero") != bc.CROWN() and bc.Float(2.0**-11) != bc.Float()
    run = jax.jit(lambda m, box: bc.bound(jnp.sin, m)(box), static_argnums=0)
    assert run(bc.IBP(), bc.Box(jnp.zeros(1), jnp.ones(1))).lower.tolist() == [0.0]
