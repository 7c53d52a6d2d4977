"""Reads GGUF: one file, or all files of a split, wherever in it one begins."""

from collections.abc import Iterable

from lingconv.containers.checkpoint import WITH_ITS_FILE, Absence, Checkpoint
from lingconv.containers.gguf.header import (
    SPLIT_COUNT,
    SPLIT_NO,
    SPLIT_TENSORS,
    Header,
    first_sibling,
    read_header,
    siblings,
)
from lingconv.containers.gguf.to_hf import plain_values
from lingconv.containers.stored_tensor import (
    FETCH_AGAIN,
    CutShort,
    HeaderError,
    StoredTensor,
    add_tensors,
)
from lingconv.errors import CheckpointError, Fault
from lingconv.plans.key_values import Value
from lingconv.storage import Storage
from lingconv.storage.file_names import SUFFIX

_MAX_NAMED = 20


def models_in(names: Iterable[str]) -> list[str]:
    """Return the first file of every GGUF model among the files of a folder."""
    found = (first_sibling(name) for name in names if name.endswith(SUFFIX) and "/" not in name)
    return sorted(set(found))


class GgufReader:
    """Collects the parts of a Checkpoint and every fault met on the way."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage = storage
        self.names = siblings(name)
        self.files = storage.files()
        self.left_out = storage.left_out()
        self.faults: list[Fault] = []

    def read(self) -> Checkpoint:
        """Read all headers; raise CheckpointError when the first file's is of no use."""
        missing = [name for name in self.names if name not in self.files]
        self._fault_missing(missing)
        there = (name for name in self.names if name in self.files)
        headers = {name: header for name in there if (header := self._read(name)) is not None}
        first = headers.get(self.names[0])
        if first is None:
            raise CheckpointError(f"{self.storage.uri} cannot be read", faults=self.faults)
        tensors: dict[str, StoredTensor] = {}
        absent: dict[str, Absence] = {}
        for header in headers.values():
            add_tensors(tensors, header.tensors, self.faults)
            absent.update(dict.fromkeys(header.unread, WITH_ITS_FILE))
        self._check_split(headers, len(tensors))
        split = (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS)
        metadata = {key: value for key, value in first.metadata.items() if key not in split}
        return Checkpoint(
            storage=self.storage,
            config=plain_values(metadata),
            tensors=tensors,
            shards={name: self.files[name] for name in headers},
            side_files={},
            ignored={},
            faults=tuple(self.faults),
            format="gguf",
            metadata=metadata,
            absent=absent,
            has_unread=len(headers) < len(self.names),
        )

    def _fault_missing(self, missing: list[str]) -> None:
        """Name the files of a split that are not there, the first of them each by itself."""
        for name in missing[:_MAX_NAMED]:
            message = f"is missing: the model is split into {len(self.names)} files"
            message = self.left_out.get(name, message)
            hint = "" if name in self.left_out else "fetch the missing files again"
            self.faults.append(Fault("missing file", message, name, hint=hint))
        if len(missing) > _MAX_NAMED:
            message = f"{len(missing) - _MAX_NAMED:,} files more are missing"
            self.faults.append(Fault("missing file", message, missing[_MAX_NAMED]))

    def _read(self, name: str) -> Header | None:
        size = self.files[name].size
        try:
            header = read_header(lambda at, count: self.storage.read(name, at, count), size, name)
        except HeaderError as exc:
            hint = FETCH_AGAIN if isinstance(exc, CutShort) else ""
            self.faults.append(Fault("header", str(exc), name, hint=hint))
            return None
        self.faults += header.faults
        return header

    def _check_split(self, headers: dict[str, Header], num_tensors: int) -> None:
        """Compare what the files say of each other with their names and with what is there."""
        for index, name in enumerate(self.names):
            if name not in headers:
                continue
            metadata = headers[name].metadata
            count, number = _number(metadata, SPLIT_COUNT, 1), _number(metadata, SPLIT_NO, 0)
            if (number, count) != (index, len(self.names)):
                message = f"says it is file {number + 1} of {count}, its name says {index + 1} of"
                self.faults.append(
                    Fault(
                        "split",
                        f"{message} {len(self.names)}",
                        name,
                        hint="llama.cpp finds the parts of a split by their names: restore them",
                    )
                )
            stated = _number(metadata, SPLIT_TENSORS, num_tensors)
            complete = len(headers) == len(self.names)
            if complete and stated != num_tensors and not self.faults:
                message = f"says the split has {stated:,} tensors, its files hold {num_tensors:,}"
                self.faults.append(Fault("split", message, name))


def _number(metadata: dict[str, Value], key: str, default: int) -> int:
    value = metadata[key].data if key in metadata else default
    return value if type(value) is int else -1
