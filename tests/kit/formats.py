"""Formats under test: a line for each, which says how it is written.

A new format is one more `FormatCase` in `CASES`; `tests/test_formats.py` has the tests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from lingconv.errors import CheckpointError
from lingconv.model.parallelism import Parallel
from lingconv.plans.options import ConvertOptions, GgufOptions, MegatronOptions
from lingconv.storage import FileStat

HF = ConvertOptions()


@dataclass(frozen=True, slots=True, eq=False)
class FormatCase:
    """A format as a target, and the way back.

    `file` is what the target is called inside of its folder, where that is not the folder itself.
    `padding`: so many zeros, less one, may lie between elements without being part of a frame.
    `back` are the options that give the tensors of the golden model again. `fails` are tests that
    are known to fail, with the reason.
    """

    name: str
    format: str
    options: ConvertOptions
    file: str = ""
    padding: int = 1
    back: ConvertOptions = HF
    fails: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def target(self, folder: Path) -> Path:
        """Return what to convert to."""
        return folder / self.file if self.file else folder


RANKS = Parallel(tp=2, pp=2, ep=2)

CASES = [
    FormatCase("hf", "safetensors", ConvertOptions(max_shard_bytes=3_000_000)),
    FormatCase("hf-merged", "safetensors", ConvertOptions(layout="hf-merged")),
    FormatCase(
        "gguf",
        "gguf",
        ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="bf16")),
        file="x.gguf",
        padding=32,
        back=ConvertOptions(dtype="bf16"),
    ),
    FormatCase(
        "megatron", "torch_dist", ConvertOptions(layout="megatron", max_shard_bytes=3_000_000)
    ),
    FormatCase(
        "megatron-ranks",
        "torch",
        ConvertOptions(layout="megatron-ranks", megatron=MegatronOptions(parallel=RANKS)),
    ),
]


class InMemory:
    """A storage that counts: the bytes that were read, and the most that was asked for at once."""

    parallel_reads = 1
    uri = "memory"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.contents = files
        self.bytes_read = 0
        self.largest_request = 0

    def files(self) -> dict[str, FileStat]:
        """Return every file, hidden ones left out, as folders do."""
        hidden = {name for name in self.contents if name.rpartition("/")[2].startswith(".")}
        return {name: self.stat(name) for name in self.contents if name not in hidden}

    def stat(self, name: str) -> FileStat:
        if name not in self.contents:
            raise CheckpointError(f"{name} is not there")
        return FileStat(len(self.contents[name]), "1")

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        whole = self.stat(name).size
        self.largest_request = max(self.largest_request, whole if size is None else size)
        data = self.contents[name][offset : None if size is None else offset + size]
        self.bytes_read += len(data)
        return data

    def open(self, name: str) -> "MemoryBlob":
        self.stat(name)
        return MemoryBlob(self, name)

    def release(self, name: str) -> None:
        """Nothing is held."""


class MemoryBlob:
    descriptor = None

    def __init__(self, storage: InMemory, name: str) -> None:
        self._storage, self._name = storage, name

    def expect(self, offset: int, nbytes: int) -> None:
        """Nothing is far away."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        data = self._storage.read(self._name, offset, len(buffer))
        if len(data) < len(buffer):
            raise CheckpointError(f"{self._name} ends at byte {offset + len(data):,}")
        buffer[:] = data

    def close(self) -> None:
        """Nothing is open."""


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds but the notes of the run that wrote it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".lingconv" not in path.as_posix()
    }


# Hostile bytes ------------------------------------------------------------------------------------

_AREA = 4096  # headers, pickles and key-values at the begin; directories of zip at the end
_HUGE = (2**63 - 1, 2**64 - 1, 2**62, 2**48, 2**40 + 1, 2**31 - 1, 2**32 - 1, 0)


def lengths(size: int, chosen: Random) -> list[int]:
    """Return lengths to cut a file to: nothing, in its first fields, in its header, at its end."""
    fixed = [0, 1, 7, 8, 9, 23, 24, 100, size // 2, size - 23, size - 2, size - 1]
    near = [chosen.randrange(min(size, _AREA)) for _ in range(6)]
    return sorted(
        {length for length in (*fixed, *near, chosen.randrange(size)) if 0 <= length < size}
    )


def _place(data: bytearray, chosen: Random) -> int:
    """Return an offset near the begin or the end of a file."""
    at = chosen.randrange(min(len(data), _AREA))
    return len(data) - 1 - at if chosen.random() < 0.4 else at


def _flip(data: bytearray, at: int, chosen: Random) -> None:
    for _ in range(chosen.choice((1, 1, 3, 8))):
        data[_place(data, chosen)] ^= 1 << chosen.randrange(8)


def _zero(data: bytearray, at: int, chosen: Random) -> None:
    count = min(chosen.choice((1, 4, 16, 300)), len(data) - at)
    data[at : at + count] = bytes(count)


def _scramble(data: bytearray, at: int, chosen: Random) -> None:
    count = min(chosen.choice((1, 4, 16)), len(data) - at)
    data[at : at + count] = chosen.randbytes(count)


def _enlarge(data: bytearray, at: int, chosen: Random) -> None:
    """Put a huge number where a length may stand."""
    width = chosen.choice((2, 4, 8))
    first = chosen.choice((at, at // 8 * 8, at // 4 * 4, 0, 8, 16))
    number = (chosen.choice(_HUGE) % 256**width).to_bytes(width, "little")
    if first + width <= len(data):
        data[first : first + width] = number


def _digits(data: bytearray, at: int, chosen: Random) -> None:
    """Change digits of a JSON text, where there are any."""
    for place in range(at, min(at + 200, len(data))):
        if chr(data[place]).isdigit():
            data[place : place + 1] = chosen.choice((b"9" * 20, b"-1", b"0", b"1e9", b"[]", b'"'))
            return


def _repeat(data: bytearray, at: int, chosen: Random) -> None:
    """Move everything behind a place, by bytes that are there twice or not at all."""
    count = chosen.choice((1, 2, 8, 64))
    data[at:at] = data[at : at + count]


def _drop(data: bytearray, at: int, chosen: Random) -> None:
    del data[at : at + chosen.choice((1, 2, 8, 64))]


_CHANGES: tuple[Callable[[bytearray, int, Random], None], ...] = (
    _flip, _zero, _scramble, _enlarge, _enlarge, _digits, _repeat, _drop,
)  # fmt: skip


def spoilt(files: Mapping[str, bytes], chosen: Random) -> tuple[dict[str, bytes], str]:
    """Return files of which one was changed, and in words what was done."""
    name = chosen.choice([name for name in files if files[name]])
    data = bytearray(files[name])
    change = chosen.choice(_CHANGES)
    at = _place(data, chosen)
    change(data, at, chosen)
    return {**files, name: bytes(data)}, f"{change.__name__[1:]} {name} at {at}"
