"""The C allocator, told to keep its pages between training steps.

XLA on CPU allocates one block of temporaries for each call of a jitted function and frees it after.
From 32 MiB on (a robust step of the small CNN at batch 256 takes 35) glibc hands such a block back
to the system, which then faults in and clears every page again at the next step: a fifth of the
step's time.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_LARGEST_KEPT = 1 << 30
_MOST_KEPT = (1 << 31) - 1


def keep_freed_pages() -> bool:
    """Keeps freed blocks of up to 1 GiB, 2 GiB in all, for the next call.

    Returns:
        Whether the allocator took it: False where it is not glibc's, and then nothing has changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    taken = [mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT), mallopt(_TRIM_THRESHOLD, _MOST_KEPT)]
    return all(taken)
