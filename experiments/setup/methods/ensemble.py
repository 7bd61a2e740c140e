"""A deep ensemble: networks of map, each from an initialisation of its own."""

from dataclasses import dataclass, field

import jax

from bnncert import infer
from bnncert.types import Algorithm

from ..requirements import AtLeast1
from .map import MAP
from .task import Task


@dataclass(frozen=True)
class Ensemble:
    """Several networks of map."""

    members: AtLeast1 = 5
    """Networks of the ensemble."""
    member: MAP = field(default_factory=MAP)

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.ensemble` of `bnncert.infer.map`."""
        side_by_side = task.model.dense or jax.default_backend() != "cpu"
        members = infer.ensemble.build(
            self.member.build(task), self.members, vectorize=side_by_side
        )
        # Each member has an initialisation of its own.
        return members._replace(init=lambda key, params: members.init(key, task.model.init))
