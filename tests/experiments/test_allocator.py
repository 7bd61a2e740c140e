"""Freed pages are kept: a second block of temporaries is not faulted in again."""

import subprocess
import sys

import pytest

from experiments.pipeline.allocator import keep_freed_pages

_FAULTS = """
import resource
import numpy as np
from experiments.pipeline.allocator import keep_freed_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(48 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keep}:
    keep_freed_pages()
first, second = faults(), faults()
print(first, second)
"""


def _faults(*, keep: bool) -> tuple[int, int]:
    command = [sys.executable, "-c", _FAULTS.format(keep=keep)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first, second = map(int, out.split())
    return first, second


@pytest.mark.skipif(not keep_freed_pages(), reason="needs glibc's allocator")
def test_a_large_block_is_faulted_in_once() -> None:
    first, second = _faults(keep=True)
    assert second < first / 10, (first, second)
    assert second < _faults(keep=False)[1] / 10
