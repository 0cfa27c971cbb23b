"""The C library's heap, on a machine without accelerators, where XLA takes the work space of each step from it; and memory beside
it, for what is large and stays."""

import ctypes
import functools
import importlib.metadata
import math
import mmap
import os
import threading

import numpy as np

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc


@functools.cache
def library():
    """glibc, or None: another C library, or a machine with accelerators, whose step takes its work space elsewhere."""
    accelerators = importlib.metadata.entry_points(group="jax_plugins")
    if accelerators and os.environ.get("JAX_PLATFORMS") != "cpu":
        return None
    try:
        found = ctypes.CDLL(None)
        return found if found.mallopt and found.malloc_trim else None
    except (AttributeError, OSError):
        return None


def keep_freed_memory() -> None:
    """Rather than give it back to the kernel: XLA allocates the work space of a step anew each time, and mapping and clearing its
    pages again took a quarter of a small step."""
    if libc := library():
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


def one_heap() -> None:
    """For all threads: of one each, what the threads of a conversion have freed would stay taken."""
    if libc := library():
        libc.mallopt(M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """What an evaluation or a save leaves in the heap keeps the next step's work space from its old place: without this that
    would stay taken, and each save of a run would add another (7.6 GiB instead of 5 for GPT-2 small)."""
    if libc := library():
        libc.malloc_trim(0)


def empty(shape, dtype: np.dtype) -> np.ndarray:
    """Memory that XLA takes as it is on a CPU, rather than to copy it: it begins with a page. Not NumPy's own, which asks for
    huge pages: a virtual machine that gave them back to its host gets them again at five times the cost of small ones."""
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype, count).reshape(shape)


class Scratch(threading.local):
    """Room for an array of each thread, taken again for the next: new pages may cost more than what is done with them."""

    def __init__(self):
        self.memory = empty([0], np.dtype(np.uint8))

    def array(self, shape, dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if size > len(self.memory):
            self.memory = empty([size], np.dtype(np.uint8))
        return self.memory[:size].view(dtype).reshape(shape)
