"""Reusable page-aligned buffers: the page faults of a fresh allocation are paid only once."""

import mmap
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np

from lingconv.storage import BLOCK_BYTES

Array = np.ndarray[Any, Any]

_NOT_WRITTEN = -1  # the slot of buffers that are not written to a file


def aligned_buffer(nbytes: int) -> Array:
    """Return new bytes at a page boundary, in huge pages if the system has them."""
    pages = mmap.mmap(-1, max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE)
    with suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


class Arena:
    """A worker's buffers, one for each purpose, page-aligned so that they suit direct I/O.

    Buffers that are written to a file exist once per `slot`, so that one may await its write while
    another is filled.
    """

    def __init__(self, allocate: Callable[[int], Array] = aligned_buffer) -> None:
        self.slot = 0
        self._allocate = allocate
        self._buffers: dict[tuple[str, int], Array] = {}

    def take(
        self, purpose: str, shape: tuple[int, ...], dtype: Any, like: int | None = None
    ) -> Array:
        """Return an array for `purpose`; its former content is overwritten.

        `like` is the offset in a file at which the array is going to be written: the array then has
        the same offset within its page as the file's byte in its block, as direct I/O requires.
        """
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        first = (like or 0) % BLOCK_BYTES
        key = purpose, _NOT_WRITTEN if like is None else self.slot
        held = self._buffers.get(key)
        if held is None or held.size < first + nbytes:
            held = self._buffers[key] = self._allocate(BLOCK_BYTES + nbytes)
        array: Array = held[first : first + nbytes].view(dtype).reshape(shape)
        return array


def as_bytes(array: Array) -> memoryview:
    """Return the bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data
