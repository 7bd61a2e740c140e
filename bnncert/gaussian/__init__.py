"""Bounds on networks with Gaussian weights, linear in the weights.

margins     the bounds, their theory, and what follows from them for a posterior
tails       of concave functions of Gaussian numbers, in float64
network     intervals of a network's values, and rows through it
slopes      lines that are optimised
ends        where rows end
layers      what the weights of a layer deviate by
folded      the mean of |z|, z Gaussian
weights     where a network's weights are
"""

from bnncert.gaussian.margins import Margins, margins
from bnncert.gaussian.weights import leaves_of

__all__ = ["Margins", "leaves_of", "margins"]
