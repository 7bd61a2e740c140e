"""The direction of imports: a module may only import the ones above it in `ORDER`."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A package's __init__ stands where the package's own name stands: it re-exports what is above it.
ORDER = """
    _compiler.wrong_sums _compiler.convolution _compiler
    types _varying sets _emptiness
    bounds.graph.operands bounds.graph.primitives bounds.graph.constants bounds.graph.nodes
    bounds.graph.facts bounds.graph.precision bounds.graph.advice bounds.graph
    bounds.ops.lines bounds.ops.planes bounds.ops.boxes bounds.ops.extremes bounds.ops.operation
    bounds.ops.affine bounds.ops.curves bounds.ops.elementwise bounds.ops.piecewise
    bounds.ops.smooth bounds.ops.hinges bounds.ops.powers bounds.ops.waves bounds.ops.pairs
    bounds.ops.products bounds.ops.reductions bounds.ops.normalising bounds.ops.intervals bounds.ops
    bounds.tracing.windows bounds.tracing.parameters bounds.tracing.loops bounds.tracing.equations
    bounds.tracing.randomness bounds.tracing.endings bounds.tracing.fusion
    bounds.tracing.coordinates bounds.tracing.normalisation
    bounds.tracing.recognition bounds.tracing.rewriting bounds.tracing.walk bounds.tracing
    bounds.propagate
    bounds.rounding.model bounds.rounding.functions bounds.rounding.terms
    bounds.rounding.constants bounds.rounding.reordering bounds.rounding.intervals
    bounds.rounding.affine bounds.rounding.relaxed bounds.rounding
    bounds.arithmetic bounds.norms bounds.merging bounds.rows bounds.runs bounds.plan
    bounds.coloring
    bounds.methods.steps bounds.methods.ibp bounds.methods.forward
    bounds.methods.crown bounds.methods.alpha_crown bounds.methods
    bounds.api bounds.margins bounds.mean bounds.own bounds.widening bounds outputs testing
    prior posterior.leaves posterior.mean_field posterior.samples posterior.low_rank
    posterior.gaussian posterior.mixture posterior.summary posterior
    gaussian.folded gaussian.tails gaussian.weights gaussian.layers gaussian.ends
    gaussian.network gaussian.slopes gaussian.margins gaussian
    likelihood.parts likelihood.mixture likelihood.categorical likelihood.quantile
    likelihood.regression likelihood
    infer._minibatch infer.map infer._elbo infer._variational infer.bbb
    infer.low_rank infer.guide infer.svi infer._natural_gradient infer.vogn infer.noisy_adam
    infer.ivon infer.swag infer.diagnostics infer._potential infer._progress infer.mcmc infer.hmc
    infer.nuts infer._sgmcmc infer.sgld infer.sghmc infer.laplace infer.ensemble infer
    attack._predictive attack._geometry attack._losses
    attack.fgsm_pgd attack.auto_pgd attack.square_search attack.full_battery attack
    certify.inputs
    certify.exact certify.exact.softmax certify.exact.decision certify.exact.joint
    certify.exact.cascade certify.exact.uncertainty
    certify.formal certify.formal.mass certify.formal.boxes certify.formal.claims
    certify.formal.safety certify.formal.rectified
    certify.formal.moments certify.formal.expected_softmax certify.formal.expectation
    certify.sampled certify.sampled.inequalities certify.sampled.draws certify.sampled.decision
    certify.sampled.safety
    certify.radii certify
    metrics.scores metrics.calibration metrics.uncertainty metrics.detection metrics parallel
    interop.weights interop.properties interop.certificates interop
""".split()

# The core dependencies, and NumPy and SciPy, which JAX brings.
THIRD_PARTY = {"jax", "jaxtyping", "numpy", "numpyro", "optax", "scipy", "tqdm"}

LIBRARY = sorted((ROOT / "bnncert").rglob("*.py"))
EVERYTHING = sorted(
    path for folder in ("bnncert", "experiments", "tests") for path in (ROOT / folder).rglob("*.py")
)

pytestmark = pytest.mark.smoke


def imported(source: str, package: str = "") -> set[str]:
    """Full names of all that a module imports, at the top or inside functions.

    `from a import b` counts as a.b, which may be a module or something inside a.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(parent if node.level else []) + ("." if node.level else "")
            base = (base + (node.module or "")).rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def attributes(source: str) -> set[str]:
    """Dotted attribute chains on plain names, such as `jax.extend.core`."""
    return {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}


def place(name: str) -> int | None:
    """Position in ORDER of the longest entry that `name` (without `bnncert.`) lies in."""
    parts = name.split(".")
    entries = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((ORDER.index(entry) for entry in entries if entry in ORDER), None)


def downward(module: str, source: str, package: str) -> list[str]:
    """Imports of `module` (without `bnncert.`) that do not point upwards in ORDER."""
    assert module in ORDER, f"give bnncert.{module} a place in ORDER"
    here = place(module)
    assert here is not None
    wrong = []
    for name in sorted(imported(source, package)):
        if name.split(".")[0] != "bnncert":
            continue
        inner = name.removeprefix("bnncert").lstrip(".")
        there = place(inner)
        if not (there is not None and there < here):
            wrong.append(name)
    return wrong


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_imports_point_upwards(path: Path) -> None:
    parts = path.relative_to(ROOT / "bnncert").with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    if module in ("", "__main__"):
        return  # the front door re-exports everything; the command asks it for its version
    package = "bnncert." + ".".join(parts[:-1])
    assert not downward(module, path.read_text(), package.rstrip("."))


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_the_library_needs_only_its_core_dependencies(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path.read_text(), "bnncert")}
    allowed = THIRD_PARTY | {"bnncert"} | sys.stdlib_module_names
    assert tops <= allowed, f"imports {sorted(tops - allowed)}"  # experiments is not among them


@pytest.mark.parametrize("path", EVERYTHING, ids=relative)
def test_only_public_jax(path: Path) -> None:
    source = path.read_text()
    names = imported(source) | attributes(source)
    assert not {name for name in names if f"{name}.".startswith("jax._src.")}


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_only_the_tracer_s_files_look_at_jaxprs(path: Path) -> None:
    # `convolution.py` works around a compiler's limitation: kept apart, to be deleted one day.
    if path.parent.name in ("graph", "tracing") or path.stem == "convolution":
        return
    source = path.read_text()
    names = imported(source) | attributes(source)
    extend = {name for name in names if f"{name}.".startswith("jax.extend.")}
    looks = {name for name in names if name.split(".")[-1] in ("make_jaxpr", "jaxpr", "eqns")}
    assert not extend | looks


@pytest.mark.parametrize("path", sorted((ROOT / "bnncert/certify").rglob("*.py")), ids=relative)
def test_certificates_know_nothing_of_inference(path: Path) -> None:
    """It takes stacked samples or a Gaussian, so it serves posteriors from anywhere."""
    names = imported(path.read_text(), "bnncert.certify")
    assert not {name for name in names if f"{name}.".startswith("bnncert.infer.")}


def test_the_checks_can_fail() -> None:
    assert downward("sets", "from bnncert.likelihood import Threat", "bnncert")
    assert downward("sets", "def f():\n  import bnncert.infer.svi", "bnncert")
    assert downward("bounds.api", "from ..likelihood import Threat", "bnncert.bounds")
    assert downward("certify.exact.decision", "from bnncert.metrics import ece", "bnncert.certify")
    assert downward("attack", "from bnncert.certify import decision", "bnncert")
    assert imported("from ..infer import svi", "bnncert.certify") == {"bnncert.infer.svi"}
    assert downward("attack", "import bnncert as bc", "bnncert")
    assert downward("bounds.api", "from bnncert import sets, attack", "bnncert.bounds") == [
        "bnncert.attack"
    ]
    assert not downward("bounds.api", "from .methods import ibp", "bnncert.bounds")
    assert downward("bounds.ops.affine", "from bnncert.bounds.ops import x", "")
    assert imported("from jax._src import core") == {"jax._src.core"}
    assert "jax._src.core" in attributes("jax._src.core.Jaxpr")
