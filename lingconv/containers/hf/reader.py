"""Reads a Hugging Face folder: safetensors shards, their index, config.json."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from lingconv.containers.checkpoint import WITH_ITS_FILE, Absence, Checkpoint
from lingconv.containers.hf import safetensors
from lingconv.containers.hf.small_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    MAX_NAMED,
    left_out_faults,
    read_json,
    sort_other_files,
    take_pointers,
)
from lingconv.containers.stored_tensor import FETCH_AGAIN, HeaderError, StoredTensor, add_tensors
from lingconv.errors import CheckpointError, Fault
from lingconv.errors.value_kinds import shown
from lingconv.storage import FileStat, Storage
from lingconv.storage.file_names import CONFIG_NAME
from lingconv.storage.records import stand_in

_Header = safetensors.Header | HeaderError
_PEEK_BYTES = 256
_FETCH = "fetch the missing shards again"
_ALL_FILES = (
    f"name the file in `weight_map` of {safetensors.INDEX_NAME}, or remove that index: then all"
    " *.safetensors files are read"
)


def _is_inside(name: str) -> bool:
    """Return whether `name` is a file of the folder, or of a folder in it, and no way out."""
    parts = PurePosixPath(name).parts
    odd = name != "/".join(parts) or name.startswith("/") or "\\" in name or not name.isprintable()
    return bool(parts) and not odd and not any(part.startswith(".") for part in parts)


class SafetensorsReader:
    """Collects the parts of a Checkpoint and every fault met on the way."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.files = dict(storage.files())
        self.left_out = storage.left_out()
        self.faults: list[Fault] = []
        self.absent: dict[str, Absence] = {}
        self.has_unread = False

    def read(self) -> Checkpoint:
        """Read all headers; raise CheckpointError when there are no weights at all."""
        weight_map, index_metadata = self._read_index()
        if weight_map is not None and self._is_of_another_save(weight_map):
            weight_map = None
            shards = [safetensors.SINGLE_NAME]
        else:
            shards = self._choose_shards(weight_map)
            if weight_map is None:
                shards = self._without_others(shards)
        self._fault_left_out(weight_map)
        if not shards and not any(fault.fatal for fault in self.faults):
            raise CheckpointError(
                f"{self.storage.uri} holds no *.safetensors file",
                hint="lingconv reads Hugging Face checkpoints in safetensors format, and GGUF",
            )
        tensors: dict[str, StoredTensor] = {}
        readable = self._read_shards(shards, tensors)
        self.has_unread |= weight_map is None and len(readable) < len(shards)
        side_files, ignored = self._sort_other_files(shards)
        if weight_map is not None:
            self._check_index(weight_map, index_metadata, tensors, readable)
            self._look_elsewhere(ignored, tensors)
        return Checkpoint(
            storage=self.storage,
            config=self._read_json(CONFIG_NAME),
            tensors=tensors,
            shards={name: self.files[name] for name in shards},
            side_files=side_files,
            ignored=ignored,
            faults=tuple(self.faults),
            absent=self.absent,
            has_unread=self.has_unread,
        )

    def _read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON object, or an empty one and a fault."""
        if name not in self.files:
            if not any(fault.file == name for fault in self.faults):
                self.faults.append(Fault("missing file", "is not there", name))
            return {}
        return read_json(self.storage, name, self.faults)

    def _read_index(self) -> tuple[dict[str, str] | None, dict[str, Any]]:
        name = safetensors.INDEX_NAME
        if name not in self.files:
            return None, {}
        index = self._read_json(name)
        good, odd = {}, []
        for tensor, shard in index.get("weight_map", {}).items():
            if isinstance(shard, str) and _is_inside(shard):
                good[tensor] = shard
            else:
                message = f"index points outside the folder: {shown(shard)}"
                odd.append(Fault("index", message, name, tensor))
        self.faults += odd[:MAX_NAMED]
        if len(odd) > MAX_NAMED:
            message = f"index points outside the folder {len(odd) - MAX_NAMED:,} times more"
            self.faults.append(Fault("index", message, name))
        return good, index.get("metadata") or {}

    def _choose_shards(self, weight_map: Mapping[str, str] | None) -> list[str]:
        if weight_map is None:
            names = [name for name in self.files if name.endswith(".safetensors")]
            present = [name for name in names if "/" not in name]
            if len(present) > 1:
                message = f"is missing; all {len(present)} *.safetensors files are read"
                self.faults.append(Fault("index", message, safetensors.INDEX_NAME, fatal=False))
            self._fault_missing_numbers(present)
            return sorted(present)
        named = sorted(set(weight_map.values()))
        known = self.files.keys() | self.left_out.keys()
        missing = [name for name in named if name not in known]
        message = "the index names this shard, and it is not there"
        self.faults += [Fault("missing file", message, name, hint=_FETCH) for name in missing]
        return [name for name in named if name in self.files]

    def _without_others(self, shards: list[str]) -> list[str]:
        """Return shards without an adapter, and without second copies of model.safetensors.

        Without an index, all files are read that may be parts of one model.
        """
        whole = safetensors.SINGLE_NAME
        own = self._names_in(whole) if whole in shards and len(shards) > 1 else frozenset()
        kept = []
        for file in shards:
            if file == ADAPTER and ADAPTER_CONFIG in self.files and len(shards) > 1:
                why = "an adapter beside the model"
            elif file != whole and not own.isdisjoint(self._names_in(file)):
                why = f"{whole} has tensors of the same names"
            else:
                kept.append(file)
                continue
            self.faults.append(Fault("other weights", f"is left behind: {why}", file, fatal=False))
        return kept

    def _names_in(self, file: str) -> frozenset[str]:
        """Return the names of the tensors in a file; none if it cannot be read."""
        header = self._read_header(file)
        entries = [] if isinstance(header, HeaderError) else header[0]
        return frozenset(entry.name for entry in entries)

    def _fault_missing_numbers(self, present: Collection[str]) -> None:
        """Name the shards that are not there, by the numbers in the names of those that are."""
        known = {*present, *self.left_out}
        missing = [name for name in safetensors.siblings(present) if name not in known]
        more = len(missing) - MAX_NAMED
        for name in missing[:MAX_NAMED]:
            message = "is missing: the names of the others count it"
            self.faults.append(Fault("missing file", message, name, hint=_FETCH))
        if more > 0:
            message = f"{more:,} files more are missing"
            self.faults.append(Fault("missing file", message, missing[-1], hint=_FETCH))
        self.has_unread |= bool(missing)

    def _is_of_another_save(self, weight_map: Mapping[str, str]) -> bool:
        """Return whether an index was left behind by a save in shards, and another one followed."""
        named = {*weight_map.values()}
        if (
            safetensors.SINGLE_NAME not in self.files
            or named & {**self.files, **self.left_out}.keys()
        ):
            return False
        message = (
            f"is of another save: none of the {len(named)} files that it names is there;"
            f" {safetensors.SINGLE_NAME} is read"
        )
        self.faults.append(Fault("index", message, safetensors.INDEX_NAME, fatal=False))
        return True

    def _fault_left_out(self, weight_map: Mapping[str, str] | None) -> None:
        """Name what the storage leaves out; a fault where weights or the config are among it."""
        needed = {CONFIG_NAME, safetensors.INDEX_NAME, *(weight_map or {}).values()}
        if weight_map is None:
            weights = {n for n in self.left_out if n.endswith(".safetensors") and "/" not in n}
            needed |= weights
            self.has_unread |= bool(weights)
        self.faults += left_out_faults(self.left_out, needed)

    def _read_shards(self, shards: list[str], tensors: dict[str, StoredTensor]) -> set[str]:
        """Add the tensors of all shards; return those whose header could be read at all."""
        readable = set()
        for file, header in zip(shards, self._headers(shards), strict=True):
            if isinstance(header, HeaderError):
                self.faults.append(Fault("header", str(header), file, hint=FETCH_AGAIN))
                continue
            self.faults += header.faults
            self.absent.update(dict.fromkeys(header.unread, WITH_ITS_FILE))
            add_tensors(tensors, header.tensors, self.faults)
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
            beginning = self.storage.read(file, 0, _PEEK_BYTES)
            if instead := stand_in(beginning):
                raise HeaderError(instead)
            length = safetensors.header_length(beginning[:8], size)
            return safetensors.parse_header(self.storage.read(file, 8, length), size, file)
        except HeaderError as exc:
            return exc

    def _check_index(
        self,
        weight_map: Mapping[str, str],
        metadata: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        readable: Collection[str],
    ) -> None:
        name = safetensors.INDEX_NAME
        stale: list[str] = []
        for tensor, shard in weight_map.items():
            stored = tensors.get(tensor)
            if stored is None and tensor not in self.absent:
                there = shard in readable
                stale += [tensor] if there else []
                reason = f"the index is stale: it says {shard}, which does not hold it"
                unread = Absence(f"{shard} is not read", _FETCH, is_told=True)
                self.absent[tensor] = Absence(reason) if there else unread
            elif stored is not None and shard in readable and stored.file != shard:
                message = f"index says {shard}, but it is in {stored.file}"
                self.faults.append(Fault("index", message, name, tensor))
        if stale:
            message = f"is stale: it lists {_counted(stale)} that no file holds"
            self.faults.append(Fault("index", message, name, fatal=False))
        omitted = sorted(tensors.keys() - weight_map.keys()) if weight_map else []
        if omitted:
            message = f"leaves out {_counted(omitted)} of the files that it names; they are read"
            self.faults.append(Fault("index", message, name, fatal=False))
        stated = metadata.get("total_size")
        actual = sum(tensor.nbytes for tensor in tensors.values())
        if stated is not None and stated != actual and not self.faults:
            message = f"`total_size` is {shown(stated)}, the tensors have {actual:,} bytes"
            self.faults.append(Fault("index", message, name, fatal=False))

    def _look_elsewhere(self, ignored: Iterable[str], tensors: Mapping[str, StoredTensor]) -> None:
        """Note tensors of files that the index does not name, should the model miss them."""
        stray = [name for name in ignored if name.endswith(".safetensors") and "/" not in name]
        for file in stray[:MAX_NAMED]:
            header = self._read_header(file)
            for entry in [] if isinstance(header, HeaderError) else header.tensors:
                if entry.name not in tensors:
                    reason = f"{file} holds it, which the index does not name"
                    self.absent[entry.name] = Absence(reason, _ALL_FILES)

    def _sort_other_files(
        self, shards: list[str]
    ) -> tuple[dict[str, FileStat], dict[str, tuple[FileStat, str]]]:
        """Split the files that are not read into those to carry over and those to leave behind."""
        side_files, ignored = sort_other_files(self.files, {*shards})
        self.faults += [
            Fault("stray file", f"is left behind: {why}", name, fatal=False)
            for name, (_, why) in ignored.items()
        ]
        self.faults += take_pointers(self.storage, side_files)
        return side_files, ignored


def _counted(names: list[str]) -> str:
    """Return how many tensors there are, and the first of them."""
    first = names[0][:200]
    return f"1 tensor ({first})" if len(names) == 1 else f"{len(names):,} tensors ({first} ...)"
