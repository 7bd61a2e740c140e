"""The textbook's multivariate normal, in NumPy and float64, to hold structured ones against."""

from typing import Any

import numpy as np


def flat(params, names):
    return np.concatenate([np.ravel(np.float64(params[name])) for name in names])


def log_density(x, mean, covariance):
    difference = x - mean
    mahalanobis = difference @ np.linalg.solve(covariance, difference)
    return -0.5 * (mahalanobis + np.linalg.slogdet(2 * np.pi * covariance)[1])


def kl_to_normal(mean, covariance, scale, center: Any = 0.0):
    """KL(N(mean, covariance) || N(center, scale^2 I)); scale may be one a weight."""
    variance = np.broadcast_to(np.float64(scale) ** 2, mean.shape)
    quadratic = ((np.diag(covariance) + (mean - center) ** 2) / variance).sum()
    determinants = np.log(variance).sum() - np.linalg.slogdet(covariance)[1]
    return 0.5 * (quadratic - len(mean) + determinants)


def check_moments(draws, mean, covariance):
    """Means and covariances of draws (n, P) within five standard errors."""
    n = len(draws)
    variance = np.diag(covariance)
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * np.sqrt(variance / n)).all()
    error = np.sqrt((covariance**2 + np.outer(variance, variance)) / n)
    assert (np.abs(np.cov(draws.T) - covariance) < 5 * error).all()
