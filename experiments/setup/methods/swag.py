"""SWAG: a Gaussian fitted to the weights that map goes through at the end of training."""

from dataclasses import dataclass
from typing import Annotated

from bnncert import infer
from bnncert.types import Algorithm

from ..requirements import Requirement
from .task import (
    ClipNorm,
    Collect,
    CollectFrom,
    Task,
    adam,
    collection,
)


@dataclass(frozen=True)
class SWAG:
    """A Gaussian fitted to the last iterates of map."""

    clip_norm: ClipNorm = 10.0
    collect_from: CollectFrom = 0.75
    collect: Collect = 40
    rank: Annotated[int, Requirement("0, or at least 2", lambda v: v == 0 or v >= 2)] = 20
    """Deviations collected, which give the covariance's part that is not diagonal; 0: diagonal."""

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.swag`, along Adam."""
        start, every = collection(task, self.collect_from, self.collect)
        return infer.swag.build(
            task.log_likelihood,
            task.prior,
            num_data=task.num_data,
            prepare=task.model.prepare,
            optimizer=adam(task, self.clip_norm),
            kl_weight=task.kl_weight,
            start=start,
            every=every,
            rank=self.rank,
        )
