"""Reads what Megatron wrote: the iteration that is the latest, in whichever of its formats."""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.hf.small_files import read_json, sort_other_files
from lingconv.containers.megatron import dcp_metadata as torch_dist
from lingconv.containers.megatron.args import args_of
from lingconv.containers.megatron.dcp_reader import TorchDistReader
from lingconv.containers.megatron.pickles import loads
from lingconv.containers.megatron.rank_assembly import names_of_ranks
from lingconv.containers.megatron.rank_reader import RanksReader
from lingconv.containers.megatron.torch_archive import PICKLE_NAME, ArchiveReader
from lingconv.containers.stored_tensor import HeaderError
from lingconv.errors import CheckpointError, Fault, UsageError
from lingconv.storage import FileStat, Storage
from lingconv.storage.file_names import CONFIG_NAME, RECORD_NAME

_MAX_COMMON = 64 << 20  # bytes of common.pt's pickle, which may hold the state of a scheduler
TRACKER_NAME = "latest_checkpointed_iteration.txt"


def find_iteration(storage: Storage) -> str | None:
    """Return the folder of the checkpoint, with a slash behind it, or None when there is none.

    It is the storage itself, or the one that its tracker file names. Raises CheckpointError when
    that is not there.
    """
    if _exists(storage, torch_dist.METADATA_NAME) or [*names_of_ranks(storage.files())]:
        return ""
    if not _exists(storage, TRACKER_NAME):
        return None
    word = storage.read(TRACKER_NAME, 0, 64).decode("utf-8", "replace").strip()
    if word != "release" and not re.fullmatch(r"[0-9]{1,12}", word):
        raise CheckpointError(f"{TRACKER_NAME} says {word!r}, which is no iteration")
    folder = "release/" if word == "release" else f"iter_{int(word):07d}/"
    if not any(name.startswith(folder) for name in storage.files()):
        raise CheckpointError(
            f"{storage.uri} has no folder {folder}, which {TRACKER_NAME} names",
            hint="name the folder of another iteration",
        )
    return folder


def _exists(storage: Storage, name: str) -> bool:
    with suppress(CheckpointError):
        storage.stat(name)
        return True
    return False


def read_megatron(storage: Storage, folder: str, *, main_params: bool = False) -> Checkpoint:
    """Read the checkpoint in `folder` of a storage, and the small files beside that folder.

    With `main_params` weights are the FP32 ones in the state of the optimizer. Raises UsageError
    when the files are those of ranks, where they are not read.
    """
    faults: list[Fault] = []
    inside = (name.removeprefix(folder) for name in storage.files() if name.startswith(folder))
    ranks = [*names_of_ranks(inside)]
    reader: TorchDistReader | RanksReader
    if ranks and main_params:
        raise UsageError("`main_params` is for torch_dist, not for the files of ranks")
    if ranks:
        reader = RanksReader(storage, folder, ranks)
        tensors = reader.read()
        args, names = reader.args, list(reader.files.values())
    else:
        reader = TorchDistReader(storage, folder, main_params=main_params)
        tensors = reader.read()
        args = _read_args(storage, folder + torch_dist.COMMON_NAME, faults)
        names = [*reader.files(), folder + torch_dist.METADATA_NAME]
    side_files: dict[str, FileStat] = {}
    config: dict[str, Any] = {}
    if folder:
        beside = {name: stat for name, stat in storage.files().items() if "/" not in name}
        side_files, _ = sort_other_files(beside, {TRACKER_NAME})
        if CONFIG_NAME in beside:
            config = read_json(storage, CONFIG_NAME, faults)
    return Checkpoint(
        storage=storage,
        config=config,
        tensors=tensors,
        shards={name: storage.stat(name) for name in names},
        side_files=side_files,
        ignored={},
        faults=(*reader.faults, *faults),
        format="torch" if ranks else "torch_dist",
        args=args,
        left_out=reader.left_out,
        checksums={name: tuple(sums) for name, sums in reader.checksums.items()},
        is_spread=bool(ranks),
        is_recorded=bool(folder) and _exists(storage, RECORD_NAME),
    )


def _read_args(storage: Storage, name: str, faults: list[Fault]) -> Mapping[str, Any]:
    """Return Megatron's arguments from common.pt; empty when it has none."""
    if not _exists(storage, name):
        faults.append(Fault("missing file", "is not there: no arguments", name, fatal=False))
        return {}
    size = storage.stat(name).size
    try:
        archive = ArchiveReader(lambda at, count: storage.read(name, at, count), size)
        return args_of(loads(archive.record(PICKLE_NAME, _MAX_COMMON)))
    except HeaderError as exc:
        faults.append(Fault("arguments", str(exc), name))
        return {}
