"""Robust log-likelihoods: the error model that makes a posterior robust.

For a random radius eps ~ p_eps, the adversary moves the input inside the ball of radius eps:

    p_rob(y | x, w) = E_eps[ min_{|x' - x|_inf <= eps} softmax_y f(w, x') ]

It does not sum to 1 over y, so what follows from it is a generalised (Gibbs) posterior, not a Bayes
posterior of a normalised model. The minimum is bounded below by bound propagation,

    p_worst(eps) = 1 / (1 + sum_{j != y} exp ub_j),   ub_j >= max_{x'} f_j(w, x') - f_y(w, x')

with the *margin* f_j - f_y bounded as one function (the last affine layer merged in); where outputs
are probabilities already, p_y itself is bounded. A two-point p_eps (weight lam at 0) and K drawn
radii are both

    p_rob = M_power( p_clean, p_worst(eps_1), ..., p_worst(eps_K);  weights lam, (1 - lam)/K, ... )

the weighted power mean, inside the log. `power = 1` is the arithmetic mean, the expectation above.
It has a bad optimum: where p_worst is small against p_clean its share of the gradient is

    (1 - lam) p_worst / (lam p_clean + (1 - lam) p_worst)  ->  0

and a network pays log(1/lam) for ever, never becoming robust. `power = 0` is the geometric mean,
lam log p_clean + (1 - lam) mean_k log p_worst(eps_k): the shares are lam and 1 - lam whatever the
values. By Jensen it is a lower bound on the arithmetic one, so its ELBO is still a lower bound on
the robust evidence. Powers between anneal from one to the other.

Source: Wicker et al., "Bayesian Inference with Certifiable Adversarial Robustness", AISTATS 2021,
section 4; the geometric form as in the mixed cross-entropy of Gowal et al. 2018.
"""

from bnncert.likelihood.categorical import (
    attacked_categorical,
    certified_categorical,
    clean_categorical,
    robust_categorical,
)
from bnncert.likelihood.mixture import continuous_threat, log_power_mean
from bnncert.likelihood.parts import Attack, Composed, OfPosterior, Outputs
from bnncert.likelihood.quantile import quantile_categorical, quantile_gaussian
from bnncert.likelihood.regression import robust_gaussian
from bnncert.types import Threat

__all__ = [
    "Attack",
    "Composed",
    "OfPosterior",
    "Outputs",
    "Threat",
    "attacked_categorical",
    "certified_categorical",
    "clean_categorical",
    "continuous_threat",
    "log_power_mean",
    "quantile_categorical",
    "quantile_gaussian",
    "robust_categorical",
    "robust_gaussian",
]
