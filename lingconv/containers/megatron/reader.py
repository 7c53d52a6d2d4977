"""Reads what Megatron wrote: the iteration that is the latest, in whichever of its formats."""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.hf.small_files import read_json, sort_other_files
from lingconv.containers.megatron import dcp_metadata as torch_dist
from lingconv.containers.megatron.args import args_of
from lingconv.containers.megatron.dcp_metadata import FilePlace
from lingconv.containers.megatron.dcp_reader import TorchDistReader
from lingconv.containers.megatron.pickles import loads
from lingconv.containers.megatron.rank_assembly import names_of_ranks
from lingconv.containers.megatron.rank_reader import RanksReader
from lingconv.containers.megatron.torch_archive import PICKLE_NAME, ArchiveReader
from lingconv.containers.stored_tensor import FETCH_AGAIN, HeaderError
from lingconv.errors import CheckpointError, Fault, UsageError
from lingconv.storage import FileStat, Storage
from lingconv.storage.file_names import CONFIG_NAME, RECORD_NAME

# Bytes of the pickle of what ranks share, which may hold the state of a scheduler.
_MAX_COMMON = 64 << 20
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
        args = _read_args(storage, folder, reader.common, faults)
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
        absent=reader.absent,
    )


def _read_args(
    storage: Storage, folder: str, common: FilePlace | None, faults: list[Fault]
) -> Mapping[str, Any]:
    """Return Megatron's arguments, empty when there are none: in common.pt, or among the chunks.

    `common` is where megatron-core 0.19 has put them. Where both are there, it reads common.pt.
    """
    name = folder + torch_dist.COMMON_NAME
    if _exists(storage, name):
        common = FilePlace(name, 0, storage.stat(name).size)
    if common is None:
        message = f"is not there, nor is `{torch_dist.COMMON_OBJECT}` read: no arguments"
        faults.append(Fault("missing file", message, name, fatal=False))
        return {}
    try:
        return args_of(_common_state(storage, common))
    except HeaderError as exc:
        where = "" if common.file == name else torch_dist.COMMON_OBJECT
        faults.append(Fault("arguments", str(exc), common.file, where, hint=FETCH_AGAIN))
        return {}


def _common_state(storage: Storage, place: FilePlace) -> Any:
    """Return what all ranks share; the object among the chunks is a list of that alone."""
    archive = ArchiveReader(
        lambda at, count: storage.read(place.file, place.offset + at, count), place.nbytes
    )
    state = loads(archive.record(PICKLE_NAME, _MAX_COMMON))
    return state[0] if type(state) is list and len(state) == 1 else state
