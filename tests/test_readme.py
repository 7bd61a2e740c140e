"""The code of the README, and of pages that it links to, does what the text around it says."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import bnncert as bc
from bnncert.bounds.methods import METHODS
from bnncert.bounds.ops import EVERY, LINES
from bnncert.bounds.ops.operation import BY_INTERVAL

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {
    heading: (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    for heading, page in (
        ("Bring your own model", "ten-lines.md"),
        ("What `bound` supports", "operations.md"),
        ("Other data sets and settings", "runs.md"),
    )
}


def blocks(heading: str) -> list[str]:
    """The Python blocks of a section."""
    return re.findall(r"^```python\n(.*?)^```", section(heading), re.MULTILINE | re.DOTALL)


def section(heading: str) -> str:
    """A section of the README, or of the page that it is on."""
    text = PAGES.get(heading, README)
    return re.split(r"^## ", text.split(f"\n## {heading}\n", 1)[1], flags=re.MULTILINE)[0]


def run(code: str, **names: Any) -> tuple[dict[str, Any], str]:
    """Executes a block as a reader would paste it; its names and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "page.py", "exec"), names)
    return names, printed.getvalue()


@pytest.mark.smoke
def test_the_worked_example_trains_certifies_and_attacks() -> None:
    (code,) = blocks("A worked example")
    names, printed = run(code)
    percent = r"^ *(clean|attacked|certified) (\d+\.\d)%$"
    found = {name: float(value) for name, value in re.findall(percent, printed, re.MULTILINE)}
    promised = dict(re.findall(percent, section("A worked example"), re.MULTILINE))
    assert list(found) == list(promised) == ["clean", "attacked", "certified"]
    for name, value in promised.items():
        # Another processor rounds otherwise, and training amplifies it: 2 points is its noise.
        assert abs(found[name] - float(value)) < 3.0, (name, found[name], value)
    assert found["certified"] <= found["attacked"] <= found["clean"]
    # Robust training is what made it certifiable: an ordinary posterior is hardly so.
    assert found["certified"] > 80.0
    assert len(jax.tree.leaves(names["samples"])[0]) == 16
    clean, survived, certified = names["examine"](names["x_test"], names["y_test"])
    assert not (certified & ~survived).any()
    assert not (survived & ~clean).any()


def test_the_worked_example_is_short() -> None:
    (code,) = blocks("A worked example")
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 32


*OWN, ALIKE = blocks("Bring your own model")


@pytest.mark.parametrize("code", OWN, ids=["linen", "nnx", "equinox", "plain"])
def test_your_own_model_is_bounded_and_trained(code: str) -> None:
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    names, _ = run(code)
    names, _ = run(ALIKE, **names)
    apply, params, x, box = (names[name] for name in ("apply", "params", "x", "box"))
    points = x + 0.05 * jax.random.uniform(jax.random.key(1), (500, 2), minval=-1.0, maxval=1.0)
    corners = x + 0.05 * jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    logits = jax.vmap(apply, (None, 0))(params, jnp.concatenate([points, corners]))
    assert logits.shape == (504, 3)
    assert (logits >= box.lower - 1e-5).all()
    assert (logits <= box.upper + 1e-5).all()
    assert (box.upper - box.lower < 1.0).all()
    decision = names["decision"]
    if decision.robust:
        assert (jnp.argmax(logits, 1) == decision.predicted).all()
    # "No weights either": what is random is the parameters of layers, and no statistic.
    random = [name.split("/") for name in bc.prior.names(names["prior"])]
    assert len(random) == (3 if "outer" in code else 6)
    assert not any({"batch_stats", "mean", "var", "state"} & set(name) for name in random)
    # "For bc.infer.svi.build, as above."
    likelihood = bc.likelihood.robust_categorical(apply)
    algorithm = bc.infer.svi.build(
        likelihood, names["prior"], num_data=2, optimizer=optax.sgd(1e-4)
    )
    state = algorithm.init(jax.random.key(2), params)
    batch = bc.Batch(jnp.stack([x, -x]), jnp.array([0, 1]), jnp.ones(2))
    arguments = jax.random.key(3), state, batch, bc.Threat(0.05, 0.5)
    after, info = jax.eval_shape(algorithm.update, *arguments)  # compiling it is tested elsewhere
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert info.loss.shape == ()
    draws = jax.eval_shape(lambda: algorithm.posterior(state).sample(jax.random.key(4), 3))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), params)
    assert draws == stacked


def support_table() -> str:
    """The table of the section "What `bound` supports", from the records of operations."""

    def names(*families: str) -> set[str]:
        return {operation.name for operation in EVERY if operation.family in families}

    elementwise, reductions = names("elementwise", "pair"), names("reduction")
    planes = reductions & {o.name for o in EVERY if o.relaxation is not BY_INTERVAL}
    lines, pairs = set(LINES), names("pair")
    assert lines <= elementwise and planes <= reductions  # else the table needs a row more

    def row(kind: str, names: set[str], inside: str) -> str:
        return f"| {kind} | {', '.join(f'`{name}`' for name in sorted(names))} | {inside} |"

    return "\n".join(
        [
            "| operations | primitives | linear relaxation |",
            "|---|---|---|",
            row("affine in what is bounded", names("affine"), "none needed: exact"),
            row("elementwise", lines, "two lines"),
            row("elementwise", elementwise - lines - pairs, "two constants: the interval's ends"),
            row("of two bounded values", pairs, "two planes"),
            row("of an axis", planes, "two planes"),
            row("of an axis", reductions - planes, "two constants: the interval's ends"),
            row("products of two bounded values", names("product"), "McCormick, or a chord"),
        ]
    )


def test_the_table_of_supported_operations_is_that_of_the_rules() -> None:
    table = support_table()
    assert table in section("What `bound` supports"), f"docs/operations.md must have\n{table}"


def test_the_methods_named_are_those_there_are() -> None:
    last = section("What `bound` supports").rstrip().split("\n\n")[-1]
    assert tuple(re.findall(r'`"([a-z-]+)"`', last)) == tuple(METHODS)


def test_presets_and_inference_methods_named_are_those_there_are() -> None:
    from experiments.setup.methods import METHODS
    from experiments.setup.presets import PRESETS

    text = section("Other data sets and settings")
    presets = text.split("Presets are ", 1)[1].split(". ", 1)[0]
    assert re.findall(r"`([a-z-]+)`", presets) == list(PRESETS)
    methods = text.split("`--inference` is", 1)[1].split("Every setting", 1)[0]
    assert sorted(re.findall(r"`([a-z-]+)` \(", methods)) == sorted(METHODS)


def test_files_it_points_to_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert {"docs/digits.png", "LICENSE"} <= set(targets)
    assert all((REPOSITORY / target).is_file() for target in targets)
    headings = {
        re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.*)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings
    assert (REPOSITORY / "docs/digits.png").stat().st_size < 300_000
