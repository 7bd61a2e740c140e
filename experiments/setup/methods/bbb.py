"""Bayes by Backprop: a normal distribution of the weights, fitted by Adam to the robust ELBO."""

from dataclasses import dataclass
from typing import Annotated

from bnncert import infer
from bnncert.types import Algorithm

from ..requirements import AtLeast2, one_of
from .task import ClipNorm, InitialScale, Task, adam

GUIDES = ("mean-field", "low-rank")


@dataclass(frozen=True)
class BBB:
    """Bayes by Backprop: mean-field variational inference."""

    initial_scale: InitialScale = 0.1
    clip_norm: ClipNorm = 10.0
    guide: Annotated[str, *one_of("guide of bbb", GUIDES)] = "mean-field"
    """Family of normals that is fitted: of covariance diagonal, or diagonal plus low rank."""
    rank: AtLeast2 = 20
    """Factors of the low-rank guide."""
    fit_prior: bool = False
    """Fit the prior's standard deviation to the posterior, leaf by leaf, in the place of
    --train.prior-scale (empirical Bayes)."""

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.svi`, by Adam."""
        return infer.svi.build(
            task.log_likelihood,
            task.prior,
            num_data=task.num_data,
            prepare=task.model.prepare,
            optimizer=adam(task, self.clip_norm),
            kl_weight=task.kl_weight,
            guide=self.guide,
            rank=self.rank,
            initial_scale=self.initial_scale,
            fit_prior=self.fit_prior,
        )
