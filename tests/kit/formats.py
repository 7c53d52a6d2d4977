"""Formats under test: a line for each, which says how it is written.

A new format is one more `FormatCase` in `CASES`; `tests/test_formats.py` has the tests.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

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
        "megatron",
        "torch_dist",
        ConvertOptions(layout="megatron", max_shard_bytes=3_000_000),
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

    def left_out(self) -> dict[str, str]:
        return {}

    def stat(self, name: str) -> FileStat:
        if name not in self.contents:
            raise CheckpointError(f"{name} is not there")
        return FileStat(len(self.contents[name]), "1")

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        self.stat(name)
        data = self.contents[name][offset : None if size is None else offset + size]
        self.largest_request = max(self.largest_request, len(data))
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


# What is crafted rather than damaged --------------------------------------------------------------

_DEEP = b"[" * 200_000
_LIES: tuple[Any, ...] = (10**9, 2**70, -1, 0, 1.5, "x", [1], None, True, {})
_KEYS = (
    "num_hidden_layers", "num_experts", "n_group", "vocab_size", "hidden_size",
    "num_nextn_predict_layers", "num_attention_heads", "first_k_dense_replace",
    "moe_intermediate_size",
)  # fmt: skip


def with_lies(files: Mapping[str, bytes]) -> Iterator[tuple[dict[str, bytes], str]]:
    """Yield files whose config.json, where there is one, says something absurd."""
    if "config.json" not in files:
        return
    config = json.loads(files["config.json"])
    for key in _KEYS:
        for lie in _LIES:
            text = json.dumps({**config, key: lie}).encode()
            yield {**files, "config.json": text}, f"{key} {lie}"


def _sized(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _json_traps(name: str) -> Iterator[bytes]:
    yield from (
        _DEEP,
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": NaN}',
    )


def _safetensors_traps(name: str) -> Iterator[bytes]:
    entry = b'{"a": {"dtype": "BF16", "shape": [%s], "data_offsets": [0, 8]}}'
    yield _sized(_DEEP)
    yield _sized(entry % (b"9" * 5000))
    yield _sized(entry % (b"9999999999, " * 20_000 + b"9"))


def _gguf_traps(name: str) -> Iterator[bytes]:
    def with_value(value: bytes, count: int = 1) -> bytes:
        return (
            b"GGUF" + struct.pack("<IQQ", 3, 0, count) + (_sized(b"a") + value) * min(count, 9999)
        )

    nested = struct.pack("<IQ", 9, 1) * 200_000
    yield with_value(struct.pack("<I", 9) + nested + struct.pack("<IQ", 4, 0))
    yield with_value(struct.pack("<IIQ", 9, 4, 2**61))
    yield with_value(struct.pack("<IIQ", 9, 8, 2**40) + bytes(10**6))
    yield with_value(struct.pack("<IIQ", 9, 4, 0), 2**60)
    yield b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63) + bytes(5000)


def _pickle_traps(name: str) -> Iterator[bytes]:
    yield b"\x80\x02)" + b"\x85" * 200_000 + b"."  # tuples in tuples
    yield b"\x80\x02X\xff\xff\xff\x7fa."  # a text of 2 GiB
    yield b"\x80\x02]" + b"2\x86" * 60 + b"."  # 2^60 leaves, of few bytes
    yield b"\x80\x02c__main__\nX\n)R."
    yield b"."


def _archive_traps(name: str) -> Iterator[bytes]:
    """Yield the same inside of an archive as torch.save writes it."""
    for data in _pickle_traps(name):
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
        yield made.getvalue()


# An index of 2^24 in the table of what a pickle refers to again; 2^30 takes 16 GB.
FAR_MEMO = b"\x80\x02}r" + struct.pack("<I", 1 << 24) + b"."
# A dict whose key is a million tuples in each other: to hash it overflows the stack of C.
DEEP_KEY = b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."

_TRAPS: dict[str, Callable[[str], Iterator[bytes]]] = {
    ".json": _json_traps,
    ".safetensors": _safetensors_traps,
    ".gguf": _gguf_traps,
    ".metadata": _pickle_traps,
    ".pt": _archive_traps,
}


def trapped(files: Mapping[str, bytes]) -> Iterator[tuple[dict[str, bytes], str]]:
    """Yield files of which one is crafted to take all memory, or all of the stack."""
    for name in files:
        for suffix, traps in _TRAPS.items():
            if name.endswith(suffix):
                for number, data in enumerate(traps(name)):
                    yield {**files, name: data}, f"{name}, trap {number}"
