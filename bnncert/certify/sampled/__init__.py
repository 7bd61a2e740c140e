"""The statistical tier: what independent draws of a continuous posterior say, at a confidence.

decision       the predictive's decision: `bnncert.certify.statistical`
safety         the probability that a network drawn is safe: `bnncert.certify.sampled_safety`
inequalities   Hoeffding, empirical Bernstein and Clopper-Pearson
"""
