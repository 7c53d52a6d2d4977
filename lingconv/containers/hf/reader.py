"""Reads a Hugging Face folder: safetensors shards, their index, config.json."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.hf import safetensors
from lingconv.containers.hf.small_files import read_json, sort_other_files
from lingconv.containers.stored_tensor import HeaderError, StoredTensor, add_tensors
from lingconv.errors import CheckpointError, Fault
from lingconv.storage import FileStat, Storage
from lingconv.storage.file_names import CONFIG_NAME

_Header = tuple[list[StoredTensor], list[Fault]] | HeaderError


def _is_plain_name(name: str) -> bool:
    """Return whether `name` is a file of the folder itself, not a way out of it."""
    return name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


class SafetensorsReader:
    """Collects the parts of a Checkpoint and every fault met on the way."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.files = dict(storage.files())
        self.faults: list[Fault] = []

    def read(self) -> Checkpoint:
        """Read all headers; raise CheckpointError when there are no weights at all."""
        weight_map, index_metadata = self._read_index()
        shards = self._choose_shards(weight_map)
        if not shards and not self.faults:
            raise CheckpointError(
                f"{self.storage.uri} holds no *.safetensors file",
                hint="lingconv reads Hugging Face checkpoints in safetensors format, and GGUF",
            )
        tensors: dict[str, StoredTensor] = {}
        readable = self._read_shards(shards, tensors)
        if weight_map is not None:
            self._check_index(weight_map, index_metadata, tensors, readable)
        side_files, ignored = self._sort_other_files(shards)
        return Checkpoint(
            storage=self.storage,
            config=self._read_json(CONFIG_NAME),
            tensors=tensors,
            shards={name: self.files[name] for name in shards},
            side_files=side_files,
            ignored=ignored,
            faults=tuple(self.faults),
        )

    def _read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON object, or an empty one and a fault."""
        if name not in self.files:
            self.faults.append(Fault("missing file", "is not there", name))
            return {}
        return read_json(self.storage, name, self.faults)

    def _read_index(self) -> tuple[dict[str, str] | None, dict[str, Any] | None]:
        name = safetensors.INDEX_NAME
        if name not in self.files:
            return None, None
        index = self._read_json(name)
        weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
        if not isinstance(weight_map, dict):
            self.faults.append(Fault("index", "has no `weight_map` object", name))
            weight_map = {}
        good = {}
        for tensor, shard in weight_map.items():
            if isinstance(shard, str) and _is_plain_name(shard):
                good[tensor] = shard
            else:
                message = f"index points outside the folder: {shard!r}"
                self.faults.append(Fault("index", message, name, tensor))
        return good, metadata if isinstance(metadata, dict) else {}

    def _choose_shards(self, weight_map: Mapping[str, str] | None) -> list[str]:
        present = [name for name in self.files if name.endswith(".safetensors")]
        if weight_map is None:
            present = [name for name in present if "/" not in name]
            if len(present) > 1:
                message = f"is missing; all {len(present)} *.safetensors files are read"
                self.faults.append(Fault("index", message, safetensors.INDEX_NAME, fatal=False))
            return sorted(present)
        named = sorted(set(weight_map.values()))
        self.faults += [
            Fault(
                "missing file",
                "the index names this shard, and it is not there",
                name,
                hint="fetch the missing shards again",
            )
            for name in named
            if name not in self.files
        ]
        return [name for name in named if name in self.files]

    def _read_shards(self, shards: list[str], tensors: dict[str, StoredTensor]) -> set[str]:
        """Add the tensors of all shards; return those whose header could be read at all."""
        readable = set()
        for file, header in zip(shards, self._headers(shards), strict=True):
            if isinstance(header, HeaderError):
                self.faults.append(Fault("header", str(header), file))
                continue
            entries, faults = header
            self.faults += faults
            add_tensors(tensors, entries, self.faults)
            readable.add(file)
        return readable

    def _headers(self, shards: list[str]) -> Iterator[_Header]:
        """Yield the headers of shards in their order; many at a time where answers are slow."""
        if self.storage.parallel_reads == 1:
            yield from map(self._read_header, shards)
            return
        with ThreadPoolExecutor(self.storage.parallel_reads) as threads:
            yield from threads.map(self._read_header, shards)

    def _read_header(self, file: str) -> _Header:
        size = self.files[file].size
        try:
            length = safetensors.header_length(self.storage.read(file, 0, 8), size)
            return safetensors.parse_header(self.storage.read(file, 8, length), size, file)
        except HeaderError as exc:
            return exc

    def _check_index(
        self,
        weight_map: Mapping[str, str],
        metadata: Mapping[str, Any] | None,
        tensors: Mapping[str, StoredTensor],
        readable: set[str],
    ) -> None:
        name = safetensors.INDEX_NAME
        for tensor, shard in weight_map.items():
            stored = tensors.get(tensor)
            if shard in readable and (stored is None or stored.file != shard):
                where = f"it is in {stored.file}" if stored else "it is not there"
                message = f"index says {shard}, but {where}"
                self.faults.append(Fault("index", message, name, tensor))
        for tensor in sorted(tensors.keys() - weight_map.keys()):
            message = "is not in the index, so that loaders skip it"
            self.faults.append(Fault("index", message, tensors[tensor].file, tensor))
        stated = (metadata or {}).get("total_size")
        actual = sum(tensor.nbytes for tensor in tensors.values())
        if stated is not None and stated != actual and not self.faults:
            message = f"`total_size` is {stated!r}, the tensors have {actual:,} bytes"
            self.faults.append(Fault("index", message, name, fatal=False))

    def _sort_other_files(
        self, shards: list[str]
    ) -> tuple[dict[str, FileStat], dict[str, tuple[FileStat, str]]]:
        """Split the files that are not read into those to carry over and those to leave behind."""
        side_files, ignored = sort_other_files(self.files, {*shards})
        self.faults += [
            Fault("stray file", f"is left behind: {why}", name, fatal=False)
            for name, (_, why) in ignored.items()
        ]
        return side_files, ignored
