"""Numbers into files."""

import os

import numpy as np

PIECE_BYTES = 2**18  # written at once: of larger pages, a virtual machine that gave memory back to its host has none at hand


def write_at(file: int, numbers: np.ndarray, at: int) -> None:
    """A contiguous array, from byte `at` of an open file on."""
    left = memoryview(numbers.reshape(-1).view(np.uint8))
    while left:
        done = os.pwrite(file, left[:PIECE_BYTES], at)
        left, at = left[done:], at + done


def sync(path) -> None:
    """Until a file is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
