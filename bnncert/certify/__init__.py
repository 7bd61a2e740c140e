"""Certificates for posteriors: what is proved about their predictions over a set of inputs."""

from bnncert.certify.predictive import Decision, decision, predictive

__all__ = ["Decision", "decision", "predictive"]
