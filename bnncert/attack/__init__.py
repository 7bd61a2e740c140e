"""Attacks on the posterior predictive."""

from bnncert.attack.gradient import AttackResult, _ascent, fgsm, pgd

__all__ = ["AttackResult", "_ascent", "fgsm", "pgd"]
