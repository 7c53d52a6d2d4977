"""Synthetic checkpoints: sources whose bytes are computed instead of read.

Everything else, from shard sizes to resuming, is the ordinary conversion of such a source.
"""

import bisect
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.gguf.tokenizer_json import gpt2_splitting, tokenizer_json
from lingconv.containers.stored_tensor import StoredTensor
from lingconv.encodings.dtypes import DType
from lingconv.encodings.kernels.random_normal import normal_rows, normal_table
from lingconv.encodings.tensor_spec import tensor_spec
from lingconv.errors import CheckpointError, UsageError
from lingconv.model.family import Family, Role
from lingconv.model.family_file import presets
from lingconv.model.layout import HF, build_layout
from lingconv.storage import Blob, FileStat, whole_size
from lingconv.storage.overlay import MadeBlob

_WEIGHTS = "weights"
_DEVIATION = 0.02  # initializer_range of the released configs
_NORM_DEVIATION = 0.05
_BIAS_DEVIATION = 0.01
_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>")


def read_config(config: str) -> dict[str, Any]:
    """Return the config of a preset, or the config.json at a path."""
    preset = presets().get(config)
    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    if preset is None and not path.is_file():
        raise UsageError(
            f"`{config}` is neither a preset nor a config.json",
            hint=f"presets: {', '.join(presets())}",
        )
    try:
        value = json.loads((preset or path).read_text("utf-8"))
    except ValueError as exc:
        raise UsageError(f"{config} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise UsageError(f"{config} is not a JSON object")
    return value


def cut_config(
    config: Mapping[str, Any],
    family: Family,
    *,
    layers: int | None = None,
    dense_layers: int | None = None,
    mtp: int | None = None,
) -> dict[str, Any]:
    """Return a config with fewer layers, or with more or fewer MTP layers."""
    wanted = {"layers": layers, "dense_layers": dense_layers, "mtp_layers": mtp}
    keys = {family.key(symbol, HF): value for symbol, value in wanted.items() if value is not None}
    return {**config, **keys}


def synthetic_checkpoint(config: Mapping[str, Any], family: Family, seed: int) -> Checkpoint:
    """Return a BF16 checkpoint of `config`'s model whose weights are computed when read."""
    symbols = family.resolve(config, HF)
    storage = SynthStorage(family, symbols, config, seed)
    files = storage.files()
    return Checkpoint(
        storage=storage,
        config=config,
        tensors=storage.tensors,
        shards={_WEIGHTS: files[_WEIGHTS]},
        side_files={name: stat for name, stat in files.items() if name != _WEIGHTS},
        ignored={},
        faults=(),
    )


class SynthStorage:
    """A storage with one virtual weight file, and the small files of a tokenizer."""

    parallel_reads = 1

    def __init__(
        self, family: Family, symbols: Mapping[str, Any], config: Mapping[str, Any], seed: int
    ) -> None:
        self.uri = f"synth:seed={seed}"
        self.tensors: dict[str, StoredTensor] = {}
        self._roles: dict[str, Role] = {}
        self._seed = seed
        offset = 0
        for tensor in build_layout(family, symbols, HF).tensors.values():
            dtype = DType.F32 if tensor.keep_dtype else DType.BF16
            nbytes = tensor_spec(tensor.name, dtype, tensor.shape).nbytes
            self.tensors[tensor.name] = StoredTensor(
                tensor.name, dtype, tensor.shape, _WEIGHTS, offset, nbytes
            )
            self._roles[tensor.name] = tensor.role
            offset += nbytes
        self._small = _small_files(config)
        self._stats = {name: FileStat(len(data), "") for name, data in self._small.items()}
        self._stats[_WEIGHTS] = FileStat(offset, f"seed {seed}")

    def files(self) -> Mapping[str, FileStat]:
        """Return the virtual weights and the small files."""
        return self._stats

    def left_out(self) -> Mapping[str, str]:
        """Return nothing."""
        return {}

    def stat(self, name: str) -> FileStat:
        """Return size and time of a file, as `files` has them; they never change."""
        if name not in self._stats:
            raise CheckpointError(f"{self.uri} has no file {name}")
        return self._stats[name]

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file."""
        left = max(0, self.stat(name).size - offset)
        buffer = bytearray(whole_size(name, left) if size is None else min(size, left))
        if buffer:
            self.open(name).read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def open(self, name: str) -> Blob:
        """Open a file: the virtual weights, or a small one."""
        self.stat(name)
        if name != _WEIGHTS:
            return MadeBlob(name, self._small[name])
        return SynthBlob(list(self.tensors.values()), self._roles, self._seed)

    def release(self, name: str) -> None:
        """Do nothing: no resources are held."""


class SynthBlob:
    """A virtual weight file; bytes are computed when they are read."""

    descriptor = None

    def __init__(self, tensors: list[StoredTensor], roles: Mapping[str, Role], seed: int) -> None:
        self._tensors = tensors
        self._roles = roles
        self._seed = seed
        self._offsets = [tensor.offset for tensor in tensors]
        self._table = normal_table()

    def expect(self, offset: int, nbytes: int) -> None:
        """Do nothing: there is nothing to prefetch."""

    def close(self) -> None:
        """Do nothing: no file is open."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`, across as many tensors as it covers.

        Raises CheckpointError when the file ends before.
        """
        size = self._tensors[-1].offset + self._tensors[-1].nbytes
        if offset + len(buffer) > size:
            raise CheckpointError(
                f"{_WEIGHTS} ends at byte {size:,}, before what is to be read",
                hint="report it: the plan is not that of these weights",
            )
        index = bisect.bisect_right(self._offsets, offset) - 1
        done = 0
        while done < len(buffer):
            tensor = self._tensors[index]
            start = offset + done - tensor.offset
            count = min(tensor.nbytes - start, len(buffer) - done)
            self._fill(tensor, start, np.frombuffer(buffer[done : done + count], np.uint8))
            done += count
            index += 1

    def _fill(self, tensor: StoredTensor, start: int, into: np.ndarray[Any, Any]) -> None:
        """Fill `into` from byte `start` of a tensor; kernels take whole, aligned elements alone."""
        unit = tensor.dtype.itemsize
        before, behind = start % unit, -(start + into.size) % unit
        if not (before or behind or into.ctypes.data % unit):
            self._compute(tensor, start, into)
            return
        whole = np.empty(before + into.size + behind, np.uint8)
        self._compute(tensor, start - before, whole)
        into[:] = whole[before : before + into.size]

    def _compute(self, tensor: StoredTensor, start: int, into: np.ndarray[Any, Any]) -> None:
        role = self._roles[tensor.name]
        digest = hashlib.sha256(f"{self._seed}:{tensor.name}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        if role == Role.ROUTER_BIAS:
            values = self._balanced(tensor.shape[0], seed)
            into[:] = values.view(np.uint8)[start : start + into.size]
            return
        dtype = np.uint16 if tensor.dtype == DType.BF16 else np.float32
        target = into.view(dtype)
        cols = tensor.shape[-1]
        is_norm = role == Role.NORM
        mean, deviation = (1.0, _NORM_DEVIATION) if is_norm else (0.0, _DEVIATION)
        normal_rows(target, start // target.itemsize, cols, seed, self._table, mean, deviation)

    def _balanced(self, count: int, seed: int) -> np.ndarray[Any, Any]:
        """Return `count` bias values with mean zero: each value occurs with both signs."""
        values = np.empty(count, np.float32)
        normal_rows(values, 0, count, seed, self._table, 0.0, _BIAS_DEVIATION)
        return values - values[::-1]


def _small_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Return a byte-level BPE tokenizer without merges, and generation_config.json."""
    vocab = [*_SPECIAL_TOKENS, *_byte_letters()]
    tokenizer = tokenizer_json(
        {token: number for number, token in enumerate(vocab)},
        [],
        [(number, token, True) for number, token in enumerate(_SPECIAL_TOKENS)],
        gpt2_splitting(),
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|role_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": (
            "{% for message in messages %}<role>{{ message.role }}</role>"
            "{{ message.content }}<|role_end|>{% endfor %}"
        ),
    }
    generation_config = {
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "pad_token_id": config.get("pad_token_id", 1),
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation_config,
    }
    return {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in files.items()}


def _byte_letters() -> list[str]:
    """Return the printable letter of each byte in byte-level BPE, as in GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters.update({byte: chr(256 + number) for number, byte in enumerate(others)})
    return [letters[byte] for byte in range(256)]
