"""Attacks on the posterior predictive: by gradients, by queries alone, and the battery of all.

Each is a function of one example: batch with `jax.vmap`, under one `jax.jit`.
"""

from bnncert.attack.auto import apgd, targeted_apgd
from bnncert.attack.battery import battery, strongest, transfer
from bnncert.attack.gradient import fgsm, pgd
from bnncert.attack.predictive import AttackResult
from bnncert.attack.query import square

__all__ = [
    "AttackResult",
    "apgd",
    "battery",
    "fgsm",
    "pgd",
    "square",
    "strongest",
    "targeted_apgd",
    "transfer",
]
