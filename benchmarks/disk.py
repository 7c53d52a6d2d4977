"""The ways to read, to write and to move files here, in loops that do nothing else.

    python -m benchmarks.disk [--work FOLDER]

With one thread, and with one for each processor, each with files of its own, 2 GB in all. What is
written is on disk at the end of its time. For "from disk" the page cache is emptied before, which
takes root; without, those lines are left out. lingconv reads through the page cache and writes past
it, and shares blocks where it can: the table says whether that is what this machine likes best.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import CALL_BYTES, arguments, machine, publish, warm, workplace
from lingconv.storage.aligned_buffers import aligned_buffer
from lingconv.storage.local_output import LocalOutput
from lingconv.storage.machine import num_processors

_BYTES = 2 << 30
_BEHIND_BYTES = 32 << 20
_CACHED, _DIRECT = 0, os.O_DIRECT
# sync_file_range(2): begin to write a range; wait until one is written.
_BEGIN, _WAIT = 2, 1 | 2 | 4


class Pair(NamedTuple):
    """The files that one thread reads and writes, each of `nbytes`."""

    source: Path
    target: Path
    nbytes: int

    def open(self, path: Path, flags: int) -> int:
        """Return the descriptor of one of them; a target is made with all its room."""
        if path == self.source:
            return os.open(path, os.O_RDONLY | flags)
        made = LocalOutput(path, self.nbytes)
        made.reserve()
        made.close()
        return os.open(path, os.O_RDWR | flags)


def read(pair: Pair, flags: int) -> None:
    """Read a file into one buffer."""
    buffer = aligned_buffer(CALL_BYTES)
    source = pair.open(pair.source, flags)
    for offset in range(0, pair.nbytes, CALL_BYTES):
        os.preadv(source, [buffer], offset)
    os.close(source)


def write(pair: Pair, flags: int, *, paced: bool = False) -> None:
    """Write a file from one buffer; `paced` has what is 32 MiB behind on disk."""
    buffer = aligned_buffer(CALL_BYTES)
    buffer[:] = 0x5A
    target = pair.open(pair.target, flags)
    for offset in range(0, pair.nbytes, CALL_BYTES):
        os.pwrite(target, buffer, offset)
        if paced:
            _sync_range(target, offset, _BEGIN)
            _sync_range(target, offset - _BEHIND_BYTES, _WAIT)
    os.fsync(target)
    os.close(target)


def copy(pair: Pair, read_flags: int, write_flags: int) -> None:
    """Read a file and write it again."""
    buffer = aligned_buffer(CALL_BYTES)
    source, target = pair.open(pair.source, read_flags), pair.open(pair.target, write_flags)
    for offset in range(0, pair.nbytes, CALL_BYTES):
        os.preadv(source, [buffer], offset)
        os.pwrite(target, buffer, offset)
    os.fsync(target)
    os.close(source)
    os.close(target)


def copy_in_kernel(pair: Pair) -> None:
    """Have the kernel copy a file, or share its blocks (copy_file_range)."""
    source, target = pair.open(pair.source, _CACHED), pair.open(pair.target, _CACHED)
    offset = 0
    while offset < pair.nbytes:
        offset += os.copy_file_range(source, target, pair.nbytes - offset, offset, offset)
    os.fsync(target)
    os.close(source)
    os.close(target)


def share(pair: Pair) -> None:
    """Have two files share their blocks (FICLONERANGE); raise OSError where that cannot be."""
    source = pair.open(pair.source, _CACHED)
    target = LocalOutput(pair.target, pair.nbytes)
    could = target.clone(source, 0, pair.nbytes, 0)
    target.sync()
    target.close()
    os.close(source)
    if not could:
        raise OSError("the file system shares no blocks")


def _sync_range(descriptor: int, offset: int, flags: int) -> None:
    if offset >= 0:
        _libc().sync_file_range(descriptor, offset, CALL_BYTES, flags)


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    kinds = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    libc.sync_file_range.argtypes = kinds
    return libc


class Way(NamedTuple):
    """A way to do it; `begins` says where what is read has to be before."""

    name: str
    work: Callable[[Pair], None]
    begins: str = ""


MEMORY, DISK = "memory", "disk"
WAYS = (
    Way("read what is in the page cache", lambda pair: read(pair, _CACHED), MEMORY),
    Way("read from disk, through the cache", lambda pair: read(pair, _CACHED), DISK),
    Way("read from disk, past the cache", lambda pair: read(pair, _DIRECT), DISK),
    Way("write past the cache", lambda pair: write(pair, _DIRECT)),
    Way("write through the cache, fsync at the end", lambda pair: write(pair, _CACHED)),
    Way("... with sync_file_range", lambda pair: write(pair, _CACHED, paced=True)),
    Way("copy: cached, written past it", lambda pair: copy(pair, _CACHED, _DIRECT), MEMORY),
    Way("copy: cached, through it", lambda pair: copy(pair, _CACHED, _CACHED), MEMORY),
    Way("copy: cached, copy_file_range", copy_in_kernel, MEMORY),
    Way("copy: from disk, written past it", lambda pair: copy(pair, _CACHED, _DIRECT), DISK),
    Way("copy: from disk, all past it", lambda pair: copy(pair, _DIRECT, _DIRECT), DISK),
    Way("copy: from disk, copy_file_range", copy_in_kernel, DISK),
    Way("copy: shared blocks", share, MEMORY),
)


def measure(work: Path, rounds: int, threads: int) -> dict[str, str]:
    """Return what each way moves with so many threads: GB/s, the median and the range."""
    nbytes = _BYTES // threads // CALL_BYTES * CALL_BYTES
    pairs = [Pair(work / f"source-{n}", work / f"target-{n}", nbytes) for n in range(threads)]
    for pair in pairs:
        write(pair._replace(target=pair.source, source=pair.target), _DIRECT)
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        for way in WAYS:
            with suppress(OSError):
                runs = sorted(_timed(way, pairs, pool) for _ in range(rounds))
                speeds = [threads * nbytes / seconds / 1e9 for seconds in runs]
                middle = statistics.median(speeds)
                found[way.name] = f"{middle:.1f} ({speeds[-1]:.1f}-{speeds[0]:.1f})"
    for pair in pairs:
        pair.source.unlink()
        pair.target.unlink()
    return found


def _timed(way: Way, pairs: list[Pair], pool: ThreadPoolExecutor) -> float:
    for pair in pairs:
        pair.target.unlink(missing_ok=True)
    if way.begins == MEMORY:
        warm(pairs[0].source.parent)
    os.sync()
    if way.begins == DISK:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    started = time.perf_counter()
    list(pool.map(way.work, pairs))
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__, rounds=5).parse_args()
    with workplace(wanted.work):
        several = num_processors()
        one, all_ = (measure(wanted.work, wanted.rounds, n) for n in (1, several))
    rows = [
        f"| {way.name} | {one[way.name]} | {all_[way.name]} |" for way in WAYS if way.name in one
    ]
    heads = [f"| GB/s | one thread | {several} threads |", "|---|--:|--:|"]
    table = "\n".join([*heads, *rows])
    print(f"{machine()}\n\n{table}")
    if not wanted.no_publish:
        publish(table, "disk")


if __name__ == "__main__":
    main()
