"""The exact tier: proofs about the average of the finitely many networks that are deployed.

decision      whether the class that the predictive chooses stays, and bounds on every class
softmax       what a box of margins says of one network's probabilities
joint         the same decision, with one adversarial input for all networks together
cascade       many inputs by several methods, each on those that the cheaper ones leave open
uncertainty   bounds on confidence, entropy, mean and variance
"""
