"""Attacks on the posterior predictive: by gradients, by queries alone, and the battery of all.

    fgsm_pgd        FGSM and PGD: steps along the gradient
    auto_pgd        APGD, plain and targeted: step sizes that choose themselves
    square_search   Square: a random search without gradients
    full_battery    all of them, the worst point of any, and points found on other networks

Each is a function of one example: batch with `jax.vmap`, under one `jax.jit`. An attack that fails
proves nothing; proofs are in `bnncert.certify`.
"""

from bnncert.attack._predictive import AttackResult
from bnncert.attack.auto_pgd import apgd, targeted_apgd
from bnncert.attack.fgsm_pgd import fgsm, pgd
from bnncert.attack.full_battery import battery, strongest, transfer
from bnncert.attack.square_search import square

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
