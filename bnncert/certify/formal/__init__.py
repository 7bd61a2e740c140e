"""The formal tier: proofs about a Gaussian posterior itself, with no draw of it.

safety        bounds on the probability that a network is safe: linear in the weights, or by boxes
boxes         the search for such boxes
claims        what is proved of one of them
mass          the probability of a box, rounded down
expectation   bounds on expected outputs and probabilities
moments       means and spreads, layer by layer
rectified     the moments of a rectified Gaussian
"""
