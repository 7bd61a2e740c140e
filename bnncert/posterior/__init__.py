"""Posteriors over weights: what inference returns, and what certificates and attacks deploy.

    MeanField   q(w) = prod_i N(w_i; loc_i, scale_i^2)
    LowRank     q(w) = N(w; loc, diag(scale^2) + D D^T),  D of K columns
    Gaussian    q(w) = N(w; loc, L L^T) over some leaves
    Samples     q(w) = (1/S) sum_s [w = w_s]              (the discrete measure)
    Mixture     q(w) = (1/K) sum_k q_k(w)

Each has `sample(key, n)`, `log_prob(params)` and `kl(prior)`, in nats summed over weights,

    KL(q || p) = E_q[log q(w) - log p(w)],

and `moments()`, the mean and the standard deviation of every weight. A leaf without a density is
deterministic. "Stacked" params have one leading axis more on every leaf, over weight samples. All
are pytrees: they pass through `jit` and `vmap`, and optimisers can differentiate through them.
"""

from bnncert.posterior.gaussian import Gaussian
from bnncert.posterior.low_rank import LowRank
from bnncert.posterior.mean_field import MeanField
from bnncert.posterior.mixture import Mixture
from bnncert.posterior.samples import Samples, stack
from bnncert.posterior.summary import spread

__all__ = ["Gaussian", "LowRank", "MeanField", "Mixture", "Samples", "spread", "stack"]
