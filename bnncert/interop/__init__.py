"""To and from other tools: weights by name, properties for other verifiers, certificates as files.

weights       PyTorch's and others' weights as the params of a network of one's own
properties    what is to be proved, as another verifier reads it
certificates  what was proved, as a file

This is the one package of the library that reads and writes files.
"""

from bnncert.interop.certificates import Certificate, certificate, digest, load, save
from bnncert.interop.properties import vnnlib
from bnncert.interop.weights import from_torch

__all__ = ["Certificate", "certificate", "digest", "from_torch", "load", "save", "vnnlib"]
