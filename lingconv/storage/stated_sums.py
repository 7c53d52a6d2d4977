"""Checksums that files state of their own bytes, compared while the bytes are read anyway.

Strips read a range in pieces, from several threads and in any order. The CRC-32 of each piece is
combined with those of its neighbours; when a range is whole, it is compared. What nobody reads of a
range is read by `complete`.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from isal import isal_zlib

from lingconv.errors import CheckpointError
from lingconv.storage import Blob

_PIECE_BYTES = 4 << 20


class StatedSum(NamedTuple):
    """A range of a file, and the CRC-32 that the file states of it."""

    offset: int
    nbytes: int
    crc: int


class _Run(NamedTuple):
    """Bytes of a range that have been read, and their CRC-32."""

    start: int
    end: int
    crc: int


class CheckedBlob:
    """A file whose stated sums are compared with what is read of it."""

    descriptor = None  # whoever read past this would read what nobody sums up

    def __init__(self, blob: Blob, name: str, stated: Sequence[StatedSum]) -> None:
        self._blob = blob
        self._name = name
        self._stated = sorted(stated)
        self._runs: dict[StatedSum, list[_Run]] = {}
        self._compared: set[StatedSum] = set()
        self._lock = threading.Lock()

    def expect(self, offset: int, nbytes: int) -> None:
        """Hear that bytes are going to be read soon."""
        self._blob.expect(offset, nbytes)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raise CheckpointError for bytes that are damaged."""
        self._blob.read_into(offset, buffer)
        item = self.stated_at(offset)
        if item is not None and item not in self._compared:
            part = buffer[: item.offset + item.nbytes - offset]
            self._add(item, _Run(offset, offset + len(part), isal_zlib.crc32(part)))

    def close(self) -> None:
        """Close the file."""
        self._blob.close()

    def stated_at(self, offset: int) -> StatedSum | None:
        """Return the range that a byte lies in, or None."""
        place = bisect_right(self._stated, offset, key=lambda item: item.offset) - 1
        if place < 0:
            return None
        item = self._stated[place]
        return item if offset < item.offset + item.nbytes else None

    def complete(self, item: StatedSum) -> None:
        """Read what has not been read of a range; raise CheckpointError when it is damaged."""
        buffer = memoryview(bytearray(min(_PIECE_BYTES, item.nbytes)))
        for start, end in self._unread(item):
            for offset in range(start, end, _PIECE_BYTES):
                self.read_into(offset, buffer[: min(_PIECE_BYTES, end - offset)])

    def _unread(self, item: StatedSum) -> list[tuple[int, int]]:
        with self._lock:
            if item in self._compared:
                return []
            runs = [*self._runs.get(item, ()), _Run(item.offset + item.nbytes, 0, 0)]
        starts = [item.offset, *(run.end for run in runs)]
        return [
            (start, run.start)
            for start, run in zip(starts, runs, strict=False)
            if start < run.start
        ]

    def _add(self, item: StatedSum, new: _Run) -> None:
        """Add bytes to the runs of a range, and compare it when it is whole."""
        with self._lock:
            if item in self._compared:
                return
            runs = list(_joined(self._runs.get(item, ()), new))
            self._runs[item] = runs
            if runs[0].end - runs[0].start < item.nbytes:
                return
            if runs[0].crc == item.crc:
                self._compared.add(item)
                del self._runs[item]
                return
        raise CheckpointError(
            f"{self._name} is damaged: bytes {item.offset:,} to {item.offset + item.nbytes:,} have"
            f" the CRC-32 {runs[0].crc:08x}, the file states {item.crc:08x}",
            hint="fetch or save the file again, and run the same command with `fresh`",
        )


def _joined(runs: Sequence[_Run], new: _Run) -> Iterator[_Run]:
    """Yield runs in their order with a new one; one that others overlap is left for later."""
    if any(new.start < run.end and run.start < new.end for run in runs):
        yield from runs
        return
    last: _Run | None = None
    for run in sorted([*runs, new]):
        if last is not None and last.end == run.start:
            crc = isal_zlib.crc32_combine(last.crc, run.crc, run.end - run.start)
            last = _Run(last.start, run.end, crc)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
