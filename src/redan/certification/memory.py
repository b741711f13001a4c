"""Freed memory that the process keeps, instead of asking the system for as much again."""

import ctypes
import sys
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names of them
SIZE = 2**30  # bytes


@cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory of up to a gibibyte, for as long as the process lives; elsewhere, do nothing.

    A zonotope's rows are tens of megabytes, and its projections hundreds, made and freed at each layer. By default each
    such block comes from the system page by page, which takes up to half of the time.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for threshold in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            mallopt(threshold, SIZE)
