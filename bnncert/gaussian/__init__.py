"""Bounds on networks with Gaussian weights, linear in the weights.

margins     the bounds, their theory, and what follows from them for a posterior
tails       of concave functions of Gaussian numbers, in float64
network     intervals of a network's values, and rows through it
layers      what the weights of a layer deviate by
weights     where a network's weights are
"""

from bnncert.gaussian.margins import Margins, margins

__all__ = ["Margins", "margins"]
