"""Shapes in signatures are checked in tests, and only there; fixtures for every test."""

import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Small functions run for microseconds: what counts is the time to compile them. Read by XLA once.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # later ones do not know these flags, and would abort
    _QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

# What is compiled in one module, or in a run that a test starts, is often compiled in another.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory()  # removed when the session ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Before the first import of either package: the hook only sees what is imported after it.
jaxtyping.install_import_hook(["bnncert", "experiments"], "beartype.beartype")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of prepared data and reference bounds."""
    default = REPOSITORY.parent / "shared"
    folder = Path(os.environ.get("BNNCERT_SHARED", default)).expanduser()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set BNNCERT_SHARED to one with data/tfds and reference")
    return folder


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """A TFDS data folder with mnist, fashion_mnist and cifar10, prepared."""
    return _subfolder(shared, "data/tfds")


@pytest.fixture(scope="session")
def reference(shared: Path) -> Path:
    """nets.npz and bounds.npz: bounds of small networks by an independent implementation."""
    return _subfolder(shared, "reference")


@pytest.fixture(autouse=True, scope="module")
def compiled_functions_are_dropped() -> Iterator[None]:
    """Each holds memory maps, of which a process may have 65,530: thousands of them crash it."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def float64() -> Iterator[None]:
    """Arrays made in the test are float64 by default."""
    with jax.enable_x64(True):
        yield


def _subfolder(shared: Path, name: str) -> Path:
    if not (shared / name).is_dir():
        pytest.skip(f"{shared} has no {name}")
    return shared / name
