"""What keeps compilers from computing something else than they are asked for, or dearly.

wrong_sums     a jaxlib that adds the wrong numbers
convolution    transposes of convolutions, in the form that is compiled well
"""

from bnncert._compiler.wrong_sums import avoid_wrong_sums

__all__ = ["avoid_wrong_sums"]
