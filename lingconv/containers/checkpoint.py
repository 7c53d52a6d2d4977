"""A checkpoint as it is stored: files, physical tensors, config. Headers only.

A format's reader makes one; what its tensors mean is found out by `checkpoint/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lingconv.containers.stored_tensor import StoredTensor
from lingconv.errors import Fault
from lingconv.plans.key_values import Metadata
from lingconv.storage import FileStat, Storage
from lingconv.storage.stated_sums import StatedSum


class Absence(NamedTuple):
    """Why a tensor that the files speak of is not read, or not all of it, and what to do.

    Where that depends on what the tensor is in the model, there is no hint. Where the cause is a
    fault of its file `is_told` holds: the fault of the file says it, once for all its tensors.
    """

    reason: str
    hint: str = ""
    is_told: bool = False


# Why a tensor is missing whose file has a fault of its own.
WITH_ITS_FILE = Absence("its file cannot be read", is_told=True)


class LeftOut(NamedTuple):
    """What belongs to a training run and not to the model: how many entries, how many bytes."""

    entries: int
    nbytes: int


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """What a folder holds: `shards` are read, `side_files` carried over, `ignored` left behind.

    `format` is the name of the format that read it. `metadata` are the key-values of GGUF files,
    `args` the arguments in Megatron's; other checkpoints have None. `left_out` is what Megatron's
    files hold besides weights, by kind;
    `is_recorded` tells that lingconv wrote them, `is_spread` that `tensors` are those of ranks.
    `revision` is what is known of the version, in words; `checksums` are what files state of ranges
    of their own bytes, `absent` is what is known of tensors that are not read. `has_unread` says
    that a file has a fault, and that nothing tells which tensors are in it.
    """

    storage: Storage
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: Mapping[str, FileStat]
    side_files: Mapping[str, FileStat]
    ignored: Mapping[str, tuple[FileStat, str]]
    faults: tuple[Fault, ...]
    format: str = "safetensors"
    metadata: Metadata | None = None
    args: Mapping[str, Any] | None = None
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    is_recorded: bool = False
    is_spread: bool = False
    revision: str = ""
    checksums: Mapping[str, tuple[StatedSum, ...]] = field(default_factory=dict)
    absent: Mapping[str, Absence] = field(default_factory=dict)
    has_unread: bool = False

    def __repr__(self) -> str:
        return f"<Checkpoint {self.storage.uri!r}: {self.format}, {len(self.tensors)} tensors>"
