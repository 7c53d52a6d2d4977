"""A checkpoint as it is stored: files, physical tensors, config. Headers only.

`readers/` makes one of a folder or a file; what its tensors mean is `model.py`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lingconv.containers.stored_tensor import StoredTensor
from lingconv.errors import Fault
from lingconv.plans.key_values import Metadata
from lingconv.storage import FileStat, Storage


class Absence(NamedTuple):
    """Why a tensor that the files speak of is not among those that were read, and what to do.

    Where that depends on what the tensor is in the model, there is no hint.
    """

    reason: str
    hint: str = ""


class LeftOut(NamedTuple):
    """What belongs to a training run and not to the model: how many entries, how many bytes."""

    entries: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder holds: `shards` are read, `side_files` carried over, `ignored` left behind.

    `metadata` are the key-values of GGUF files, `args` the arguments in Megatron's; other
    checkpoints have None. `left_out` is what Megatron's files hold besides weights, by kind;
    `is_recorded` tells that lingconv wrote them, `is_spread` that `tensors` are those of ranks.
    `revision` is what is known of the version, in words; `absent` is what is known of tensors that
    are not read.
    """

    storage: Storage
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: Mapping[str, FileStat]
    side_files: Mapping[str, FileStat]
    ignored: Mapping[str, tuple[FileStat, str]]
    faults: tuple[Fault, ...]
    metadata: Metadata | None = None
    args: Mapping[str, Any] | None = None
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    is_recorded: bool = False
    is_spread: bool = False
    revision: str = ""
    absent: Mapping[str, Absence] = field(default_factory=dict)
