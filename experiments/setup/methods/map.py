"""One network: the mode of the robust posterior, found by Adam."""

from dataclasses import dataclass

from bnncert import infer
from bnncert.types import Algorithm

from .task import ClipNorm, Task, adam


@dataclass(frozen=True)
class MAP:
    """One network, the mode of the robust posterior."""

    clip_norm: ClipNorm = 10.0

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.map`, by Adam."""
        return infer.map.build(
            task.log_likelihood,
            task.prior,
            num_data=task.num_data,
            prepare=task.model.prepare,
            optimizer=adam(task, self.clip_norm),
            prior_weight=task.kl_weight,
        )
