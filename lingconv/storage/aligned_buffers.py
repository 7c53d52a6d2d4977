"""Reusable buffers: memory costs page faults when it is touched for the first time, so: once."""

import mmap
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np

from lingconv.storage import BLOCK_BYTES

Array = np.ndarray[Any, Any]

_NOT_WRITTEN = -1  # the turn of what does not wait to be written


def aligned_buffer(nbytes: int) -> Array:
    """Return fresh bytes at a page boundary, in huge pages where the system gives them."""
    pages = mmap.mmap(-1, max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE)
    with suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


class Arena:
    """A worker's buffers, one for each purpose, page-aligned so that they suit direct I/O.

    What is going to be written has one for each `turn`, so that it may wait while others fill.
    """

    def __init__(self, allocate: Callable[[int], Array] = aligned_buffer) -> None:
        self.turn = 0
        self._allocate = allocate
        self._buffers: dict[tuple[str, int], Array] = {}

    def take(
        self, purpose: str, shape: tuple[int, ...], dtype: Any, like: int | None = None
    ) -> Array:
        """Return an array for `purpose`; what it held before is gone.

        Where it is for byte `like` of a file, it lies in its page as that lies in its disk block,
        so that whole blocks of the two fall together.
        """
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        first = (like or 0) % BLOCK_BYTES
        key = purpose, _NOT_WRITTEN if like is None else self.turn
        held = self._buffers.get(key)
        if held is None or held.size < first + nbytes:
            held = self._buffers[key] = self._allocate(BLOCK_BYTES + nbytes)
        array: Array = held[first : first + nbytes].view(dtype).reshape(shape)
        return array


def as_bytes(array: Array) -> memoryview:
    """Return the bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data
