"""Prefetch of remote sources: byte ranges are announced before they are read, files released after.

Local sources need neither. Over a network one answer takes as long as the work on a hundred strips,
so that many requests have to be in flight; and files that were downloaded whole take up disk until
the last output file that needs them is written.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from lingconv.plans.lowering import CopyStrip, Strip, rows_of
from lingconv.plans.plan import OutputFile
from lingconv.plans.tensor_map import ByteRange
from lingconv.storage import Blob, Storage

T = TypeVar("T")
_Key = tuple[int, str]  # a source's number, and a file of it


class Prefetcher:
    """Announces and releases the sources of a run; does nothing if all of them are local."""

    def __init__(
        self,
        storages: Sequence[Storage],
        opened: Sequence[Mapping[str, Blob]],
        window_bytes: int,
    ) -> None:
        self._storages = storages
        self._opened = opened
        self._window_bytes = window_bytes
        self._is_far = any(storage.parallel_reads > 1 for storage in storages)
        self._files_left: Counter[_Key] = Counter()
        self._strips_left: dict[str, Counter[_Key]] = {}
        self._lock = threading.Lock()

    def begin(self, files: Iterable[OutputFile]) -> None:
        """Called once, with all files that are going to be written."""
        if self._is_far:
            for file in files:
                self._files_left.update(sources_of(file))

    def open(self, file: OutputFile, strips: Callable[[], Iterable[Strip]]) -> None:
        """Called when a file is opened for writing; `strips` returns those still to be written."""
        if self._is_far:
            left = Counter(key for strip in strips() for key in self._keys(strip))
            with self._lock:
                self._strips_left[file.name] = left
            for key in sources_of(file) - left.keys():
                self._give_up(key)

    def ahead(self, tasks: Iterator[T], strip_of: Callable[[T], Strip]) -> Iterator[T]:
        """Return `tasks` in their order; the bytes that each reads are announced beforehand."""
        if not self._is_far:
            return tasks
        return announced(tasks, lambda task: self._announce(strip_of(task)), self._window_bytes)

    def done(self, file: str, strip: Strip) -> None:
        """Called when a strip of a file is written."""
        if not self._is_far:
            return
        for key in self._keys(strip):
            with self._lock:
                left = self._strips_left[file]
                left[key] -= 1
                is_last = not left[key]
            if is_last:
                self._give_up(key)

    def _give_up(self, key: _Key) -> None:
        """Note that an output file no longer needs a source file; release that after the last."""
        with self._lock:
            self._files_left[key] -= 1
            is_last = not self._files_left[key]
        if is_last:
            number, name = key
            self._storages[number].release(name)

    def _announce(self, strip: Strip) -> int:
        nbytes = 0
        for number, extent in self._needs(strip):
            self._opened[number][extent.file].expect(extent.offset, extent.nbytes)
            nbytes += extent.nbytes
        return nbytes

    def _keys(self, strip: Strip) -> set[_Key]:
        """Return the files that a strip needs, those of its matrix's peers included."""
        peers = () if isinstance(strip, CopyStrip) else chain(*strip.transfer.peers)
        also = {
            (number, segment.source.first_extent.file)
            for term in peers
            for number in term.sources
            for segment in term.segments
        }
        return {(number, extent.file) for number, extent in self._needs(strip)} | also

    def _needs(self, strip: Strip) -> Iterator[tuple[int, ByteRange]]:
        """Yield the byte ranges that a strip reads; copied bytes come from the last source."""
        if isinstance(strip, CopyStrip):
            for extent in strip.sources:
                yield len(self._storages) - 1, extent
            return
        for term in strip.terms:
            for number in term.sources:
                for segment in term.segments:
                    # In a matrix stored by columns (transposed), rows are no run of bytes.
                    extents = segment.source.extents
                    parts = range(0 if segment.source.pitch else len(extents))
                    yield from ((number, rows_of(segment, part)) for part in parts)
                    if segment.source.pitch:
                        yield number, extents[0]._replace(nbytes=0)


def sources_of(file: OutputFile) -> set[_Key]:
    """Return the source files that an output file reads, each with its source's number."""
    return {(number, extent.file) for number, extent in extents_of(file)}


def extents_of(file: OutputFile) -> Iterator[tuple[int, ByteRange]]:
    """Yield the byte ranges that an output file reads, each with its source's number."""
    for transfer in file.transfers:
        for term in chain(transfer.terms, *transfer.peers):
            for number in term.sources:
                for segment in term.segments:
                    yield from ((number, extent) for extent in segment.source.extents)


def announced(tasks: Iterable[T], announce: Callable[[T], int], window_bytes: int) -> Iterator[T]:
    """Yield `tasks` in their order, each after it and those that follow have been announced.

    `announce` returns the bytes that a task reads. About `window_bytes` are kept announced; the
    window is refilled when it is half empty, so that neighbouring ranges are announced together.
    """
    rest = iter(tasks)
    waiting: deque[tuple[T, int]] = deque()
    pending = 0
    while True:
        if pending <= window_bytes // 2:
            for task in rest:
                nbytes = announce(task)
                waiting.append((task, nbytes))
                pending += nbytes
                if pending >= window_bytes:
                    break
        if not waiting:
            return
        task, nbytes = waiting.popleft()
        pending -= nbytes
        yield task
