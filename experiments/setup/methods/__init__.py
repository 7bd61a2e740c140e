"""The inference methods: each a frozen dataclass of its own settings that builds its algorithm.

A further one is a file with such a class (`task` says what it needs) and a line of `METHODS`: its
help, its options `--inference.NAME`, its place in config.json and their checks follow from the
class.
"""

from ..requirements import check_name
from .bbb import BBB
from .ensemble import Ensemble
from .laplace import Laplace
from .map import MAP
from .mcmc import HMC, NUTS
from .natural_gradient import IVON, VOGN, NoisyAdam
from .sgmcmc import SGHMC, SGLD
from .swag import SWAG
from .task import Checked, Inference, Refining, Task

METHODS: dict[str, type[Inference]] = {
    "map": MAP,
    "bbb": BBB,
    "vogn": VOGN,
    "noisy-adam": NoisyAdam,
    "ivon": IVON,
    "swag": SWAG,
    "ensemble": Ensemble,
    "laplace": Laplace,
    "sgld": SGLD,
    "sghmc": SGHMC,
    "hmc": HMC,
    "nuts": NUTS,
}
"""Methods by their names on the command line."""


def method_of(name: str) -> type[Inference]:
    """The class of a method.

    Raises:
        ValueError: an unknown name.
    """
    check_name(name, tuple(METHODS), "inference method")
    return METHODS[name]


def name_of(method: Inference) -> str:
    """The name of a method.

    >>> name_of(SGLD())
    'sgld'
    """
    return next(name for name, kind in METHODS.items() if type(method) is kind)


def about(name: str) -> str:
    """What a method is, in a line.

    >>> about("ensemble")
    'Several networks of map'
    """
    return (METHODS[name].__doc__ or "").splitlines()[0].removesuffix(".")


__all__ = [
    "BBB",
    "HMC",
    "IVON",
    "MAP",
    "METHODS",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SWAG",
    "VOGN",
    "Checked",
    "Ensemble",
    "Inference",
    "Laplace",
    "NoisyAdam",
    "Refining",
    "Task",
    "about",
    "method_of",
    "name_of",
]
