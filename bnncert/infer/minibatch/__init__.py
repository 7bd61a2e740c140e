"""The type of a schedule, for those that import it from here."""

from bnncert.infer._minibatch import Schedule

__all__ = ["Schedule"]
