"""A search for disjoint boxes of weights, each of which a bound decides.

Disjoint by construction: the space of weights is one cell at first, and only ever cut in two by
{ w_i <= v } and { w_i >= v }. Each cell holds at most one box, inside it. The cell with the most
undecided mass is cut next:

    along a face of its box    where the box holds a fair share of the cell: the box stays whole
    in the middle              of the weight that the bound depends on most, where it does not

A box grows from an anchor in its cell, the likeliest point of it or else a random one. With a_e the
distance of its end e (two a weight) in standard deviations, and v(a) the bound that must stay
positive, the largest mass that a linear v allows has, by Lagrange,

    d log P / d a_e  =  kappa |dv / d a_e|        for all e

with one kappa, found by bisection. Ends that v depends on little go far, up to `REACH`. The
derivatives are those of the bound at the box found last, and the best of a few such rounds is kept.
What proves the box is the evaluation of the bound on its very ends, nothing before.

Source: Batten et al., "Tight verification of probabilistic robustness in Bayesian neural networks",
AISTATS 2024, section 4 (side lengths by gradients of the bound); Wicker et al., "Probabilistic
safety for Bayesian neural networks", UAI 2020 (boxes around samples). There boxes may overlap; the
condition on the sides is ours.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray
from scipy.special import ndtr, ndtri

from bnncert.certify.formal.mass import factors, log_mass

REACH = 9.0
"""Standard deviations that a side goes from its anchor at most: 2 Q(9) = 2e-19."""

FAIR_SHARE = 0.1
"""Of a cell's mass: what its box must hold to stay whole when the cell is cut."""

_DISTANCES = np.geomspace(1e-6, REACH, 400)
# d log P / d a of one end of [-a, a], decreasing
_GAINS = -0.5 * _DISTANCES**2 - np.log(np.sqrt(2 * np.pi) * (1 - 2 * ndtr(-_DISTANCES)))
_LEAST_PRICE = 1e-4  # of the largest: an end that looks free may not be, once it is far


class Proof(NamedTuple):
    """A box of weights and what was proved of it: `kind` of the claim, `witness` of an unsafe one.

    Attributes:
        lower: ends, shape (P,).
        upper: ends, shape (P,).
        safe: which of the two claims.
        witness: what else the claim names: (x, row) of an unsafe box.
    """

    lower: ndarray
    upper: ndarray
    safe: bool
    witness: tuple[Any, ...]


class Cell(NamedTuple):
    """A part of the space of weights, with the box proved in it, if any.

    Attributes:
        lower: ends, shape (P,); -inf at the start.
        upper: ends, shape (P,); inf at the start.
        proof: a `Proof` whose box lies in the cell.
        undecided: the mass of the cell outside the box, nearly.
        influence: what moves the bound, by weight; shape (P,).
    """

    lower: ndarray
    upper: ndarray
    proof: Proof | None
    undecided: float
    influence: ndarray


Value = Callable[[ndarray, ndarray], float]
Gradient = Callable[[ndarray, ndarray], tuple[ndarray, ndarray]]


class Claim(NamedTuple):
    """Something that may be proved of a box: it holds if `value(lower, upper) > 0`.

    Attributes:
        value: the bound on a box.
        gradient: its derivatives by the ends; a guide, not part of a proof.
        safe: as `Proof`.
        witness: as `Proof`.
    """

    value: Value
    gradient: Gradient
    safe: bool
    witness: tuple[Any, ...]


class Gaussian(NamedTuple):
    """A factorised Gaussian over all random weights, flat.

    Attributes:
        loc: means, shape (P,).
        scale: standard deviations, shape (P,).
    """

    loc: ndarray
    scale: ndarray


Claims = Callable[[ndarray], Claim]
"""What to try to prove around a point of the space of weights."""


def search(
    claims: Claims,
    posterior: Gaussian,
    uniform: Callable[[], ndarray],
    *,
    num_boxes: int,
    rounds: int,
    steps: int,
) -> list[Proof]:
    """Searches disjoint boxes on which a claim is proved.

    Args:
        claims: the claim to try at an anchor.
        posterior: the Gaussian.
        uniform: fresh uniform numbers, shape (P,), for random anchors.
        num_boxes: cells that are examined; at most as many boxes are found.
        rounds: of `grow`.
        steps: of `grow`.

    Returns:
        One `Proof` for each box; any two share faces at most.

    Cost: num_boxes times `grow`, twice at worst.

    Source: after Wicker et al., UAI 2020, and Batten et al., AISTATS 2024, section 4.
    """

    # From its likeliest point and, where that box holds too little, from a random one.
    def examine(lower: ndarray, upper: ndarray, known: Proof | None) -> Cell:
        whole = _probability(lower, upper, posterior)
        best, influence = known, np.zeros_like(lower, np.float64)
        for draw in (None, uniform):
            share = 0.0 if best is None else _probability(best.lower, best.upper, posterior)
            if share >= FAIR_SHARE * whole:
                break
            anchor = _anchor(lower, upper, posterior, None if draw is None else draw())
            proof, found = grow(
                claims(anchor), anchor, lower, upper, posterior, rounds=rounds, steps=steps
            )
            influence = np.maximum(influence, found)
            if proof and _probability(proof.lower, proof.upper, posterior) > share:
                best = proof
        return _cell(lower, upper, best, influence, posterior)

    # 1. The whole space is one cell.
    start = np.full_like(posterior.loc, np.inf)
    cells = [examine(-start, start, None)]
    examined = 1
    while examined < num_boxes:
        # 2. The cell with the most undecided mass is next; when there is none left, all is decided.
        heaviest = max(range(len(cells)), key=lambda i: cells[i].undecided)
        cell = cells[heaviest]
        if cell.undecided <= 0:
            break
        # 3. It is cut in two, along a face of its box or through the middle.
        parts = _cut(cell, posterior)
        if parts is None:  # no float lies between its ends
            cells[heaviest] = cell._replace(undecided=0.0)
            continue
        # 4. Each part keeps what is proved in it; the one with mass to decide is examined anew.
        del cells[heaviest]
        for lower, upper, proof, settled in parts:
            if settled or examined >= num_boxes:
                cells.append(_cell(lower, upper, proof, cell.influence, posterior))
            else:
                cells.append(examine(lower, upper, proof))
                examined += 1
    return [cell.proof for cell in cells if cell.proof is not None]


def grow(
    claim: Claim,
    anchor: ndarray,
    lower: ndarray,
    upper: ndarray,
    posterior: Gaussian,
    *,
    rounds: int,
    steps: int,
) -> tuple[Proof | None, ndarray]:
    """Grows a large box around an anchor on which a claim is proved.

    Args:
        claim: what to prove.
        anchor: a point of the cell.
        lower: ends of the cell.
        upper: ends of the cell.
        posterior: the Gaussian.
        rounds: of bisection, each with sides by the derivatives at the box found last.
        steps: of each bisection.

    Returns:
        The proof, or None; and how much each weight's standard deviation moves the bound.

    Cost: rounds steps bounds, and rounds of their gradients.

    Source: after Batten et al., AISTATS 2024, section 4.
    """
    prices = np.zeros((2, anchor.size))
    best, most = None, -math.inf
    influence = np.zeros(anchor.size)
    for _ in range(rounds):
        # 1. Bisect kappa in logs, from sides that all reach the table's end to sides of nothing.
        low, high = _GAINS[-1] - prices.max(), _GAINS[0] - prices.min()
        found, ends = None, (anchor, anchor)
        for step in range(steps):
            middle = low if step == 0 else 0.5 * (low + high)
            ends = _ends(middle + prices, anchor, lower, upper, posterior)
            if claim.value(*ends) > 0:
                found, high = ends, middle
                if step == 0:
                    break
            else:
                low = middle
        # 2. Keep the proof of the largest mass.
        if found is not None:
            logarithm = log_mass(*found, *posterior)
            if best is None or logarithm > most:
                best, most = Proof(*found, claim.safe, claim.witness), logarithm
        # 3. The sides of the next round follow the bound's derivatives at the box found.
        by_lower, by_upper = claim.gradient(*(ends if found is None else found))
        slopes = np.stack([by_lower, -by_upper]).astype(np.float64) * posterior.scale
        slopes = np.where(np.isfinite(slopes), np.maximum(slopes, 0), 0)
        influence = np.maximum(influence, slopes.sum(0))
        largest = slopes.max()
        if not largest > 0:
            break
        prices = np.log(np.maximum(slopes / largest, _LEAST_PRICE))
    return best, influence


def _ends(
    log_gains: ndarray, anchor: ndarray, lower: ndarray, upper: ndarray, posterior: Gaussian
) -> tuple[ndarray, ndarray]:
    """Makes the box whose sides have these gains, in its cell and the format of the weights."""
    reach = np.interp(-log_gains, -_GAINS, _DISTANCES) * posterior.scale
    below = np.asarray(anchor - reach[0], anchor.dtype)
    above = np.asarray(anchor + reach[1], anchor.dtype)
    return np.maximum(below, lower), np.minimum(above, upper)


def _anchor(
    lower: ndarray, upper: ndarray, posterior: Gaussian, uniform: ndarray | None
) -> ndarray:
    """Takes the likeliest point of a cell, or draws one from the Gaussian in it."""
    if uniform is None:
        return np.clip(posterior.loc, lower, upper)
    point = posterior.loc + posterior.scale * _quantile(lower, upper, posterior, uniform)
    return np.clip(np.asarray(point, posterior.loc.dtype), lower, upper)


def _quantile(
    lower: ndarray, upper: ndarray, posterior: Gaussian, fraction: ndarray | float
) -> ndarray:
    """Computes a quantile between two ends, in standard deviations, from the smaller tail."""
    below, above = (
        (end - posterior.loc.astype(np.float64)) / posterior.scale for end in (lower, upper)
    )
    right = below > 0  # there 1 - cdf has the digits
    first, last = np.where(right, -above, below), np.where(right, -below, above)
    place = np.where(right, 1 - fraction, fraction)
    inner = ndtr(first) + place * (ndtr(last) - ndtr(first))
    return np.where(right, -1, 1) * ndtri(np.clip(inner, 1e-300, 1 - 1e-16))


def _cell(
    lower: ndarray,
    upper: ndarray,
    proof: Proof | None,
    influence: ndarray,
    posterior: Gaussian,
) -> Cell:
    held = 0.0 if proof is None else _probability(proof.lower, proof.upper, posterior)
    return Cell(lower, upper, proof, _probability(lower, upper, posterior) - held, influence)


def _cut(
    cell: Cell, posterior: Gaussian
) -> list[tuple[ndarray, ndarray, Proof | None, bool]] | None:
    """Cuts a cell in two, with what is left of its box, and whether that is to stay."""
    lower, upper, proof, undecided, influence = cell
    whole = _probability(lower, upper, posterior)
    if proof is not None and whole - undecided >= FAIR_SHARE * whole:
        # the face that leaves the most outside
        sides = [
            factors(lower, proof.lower, *posterior),
            factors(proof.upper, upper, *posterior),
        ]
        relative = np.stack(sides) - factors(lower, upper, *posterior)
        side, i = np.unravel_index(np.argmax(relative), relative.shape)
        value = (proof.lower, proof.upper)[side][i]
        settled = (bool(side == 1), bool(side == 0))
    else:
        i = int(np.argmax(influence * _spread(lower, upper, posterior)))
        middle = _quantile(lower, upper, posterior, 0.5)[i] * posterior.scale[i] + posterior.loc[i]
        value = np.asarray(middle, posterior.loc.dtype)[()]
        settled = (False, False)
    if not lower[i] < value < upper[i]:
        return None
    first, last = upper.copy(), lower.copy()
    first[i] = last[i] = value
    return [
        (lower, first, _clipped(proof, lower, first), settled[0]),
        (last, upper, _clipped(proof, last, upper), settled[1]),
    ]


def _clipped(proof: Proof | None, lower: ndarray, upper: ndarray) -> Proof | None:
    """Cuts a proof to a cell: what is proved of a box is proved of its part."""
    if proof is None:
        return None
    below, above = np.maximum(proof.lower, lower), np.minimum(proof.upper, upper)
    return proof._replace(lower=below, upper=above) if (below < above).all() else None


def _spread(lower: ndarray, upper: ndarray, posterior: Gaussian) -> ndarray:
    """Computes the Gaussian's interquartile range in a cell, in standard deviations."""
    quartiles = [_quantile(lower, upper, posterior, q) for q in (0.25, 0.75)]
    return quartiles[1] - quartiles[0] + 1e-12


def _probability(lower: ndarray, upper: ndarray, posterior: Gaussian) -> float:
    return math.exp(log_mass(lower, upper, *posterior))
