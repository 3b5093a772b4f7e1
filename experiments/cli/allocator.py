"""Keep memory that was freed, on CPU: a step's temporaries are gigabytes, and to have them from the system anew costs a sixth
of its time in page faults (docs/results/speed.md)."""

import ctypes

# glibc's malloc.h: mallopt's parameters.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory():
    """Have the C library (if it is glibc) keep what is freed, in one pool. For programs, before they start threads."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)
