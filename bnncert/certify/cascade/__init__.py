"""The names of `bnncert.certify.exact.cascade`, for those that import them from here."""

from bnncert.certify.exact.cascade import STAGES, Cascade, cascade, stage_of

__all__ = ["STAGES", "Cascade", "cascade", "stage_of"]
