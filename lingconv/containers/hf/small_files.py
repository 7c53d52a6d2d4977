"""The small files beside the weights: what they hold, which are carried over, and which are not."""

from collections.abc import Collection, Mapping
from typing import Any

from lingconv.containers.hf import safetensors
from lingconv.errors import CheckpointError, Fault
from lingconv.errors.value_kinds import Field, Kind, Schema, checked
from lingconv.storage import FileStat, Storage
from lingconv.storage.file_names import CONFIG_NAME, RECORD_NAME
from lingconv.storage.records import (
    LFS_POINTER_BYTES,
    MAX_INDEX_BYTES,
    MAX_RECORD_BYTES,
    RecordError,
    lfs_pointer,
    parse_object,
    read_bytes,
)

# Weights in formats that the reader does not take here: never carried over as small files.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp", ".onnx", ".h5", ".msgpack")
# An adapter of peft's: beside a model, transformers takes the folder for the adapter.
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Small files without which a model is another one: a pointer in place of one is no oddity.
_NEEDED = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")
MAX_NAMED = 20

_TOKEN_ID = Field((Kind.INT, Kind.LIST), items=(Kind.INT,))
CONFIG_FIELDS: Schema = {
    "architectures": Field((Kind.LIST,), items=(Kind.TEXT,)),
    "model_type": Field((Kind.TEXT,)),
    "quantization_config": Field((Kind.OBJECT,)),
    "text_config": Field((Kind.OBJECT,)),
    "torch_dtype": Field((Kind.TEXT,)),
    "dtype": Field((Kind.TEXT,)),
    "bos_token_id": _TOKEN_ID,
    "eos_token_id": _TOKEN_ID,
    "pad_token_id": _TOKEN_ID,
}
INDEX_FIELDS: Schema = {
    "weight_map": Field((Kind.OBJECT,), required=True),
    "metadata": Field((Kind.OBJECT,)),
}
_SCHEMAS = {CONFIG_NAME: CONFIG_FIELDS, safetensors.INDEX_NAME: INDEX_FIELDS}
_LIMITS = {safetensors.INDEX_NAME: MAX_INDEX_BYTES}


def read_json(storage: Storage, name: str, faults: list[Fault]) -> dict[str, Any]:
    """Return the JSON object in a file that is there, without keys of a wrong type.

    Whatever is wrong with it is added to the faults; it is empty when it is no object at all.
    """
    try:
        record = parse_object(read_bytes(storage, name, _LIMITS.get(name, MAX_RECORD_BYTES)))
    except RecordError as exc:
        faults.append(Fault("json", str(exc), name))
        return {}
    except CheckpointError as exc:
        message = exc.message.removeprefix(f"{name} ")
        faults.append(Fault("json", message, name, hint=exc.hint))
        return {}
    good, odd = checked(record, _SCHEMAS.get(name, {}), name)
    faults += odd
    return good


def left_out_faults(left_out: Mapping[str, str], needed: Collection[str] = ()) -> list[Fault]:
    """Return what a storage leaves out of its folder, by name; fatal for what is needed."""
    faults = [Fault("left out", why, name, fatal=name in needed) for name, why in left_out.items()]
    faults.sort(key=lambda fault: not fault.fatal)
    if len(faults) <= MAX_NAMED:
        return faults
    fatal = sum(fault.fatal for fault in faults)
    shown = faults[: max(MAX_NAMED, fatal)]
    more = f"{len(faults) - len(shown):,} more names are left out, which are no files of the folder"
    return [*shown, Fault("left out", more, fatal=False)]


def sort_other_files(
    files: Mapping[str, FileStat], read: Collection[str]
) -> tuple[dict[str, FileStat], dict[str, tuple[FileStat, str]]]:
    """Split what is not `read` into files to carry over, and weights that are left behind."""
    own = {CONFIG_NAME, RECORD_NAME, safetensors.INDEX_NAME, *read}
    side_files: dict[str, FileStat] = {}
    ignored: dict[str, tuple[FileStat, str]] = {}
    for name, stat in files.items():
        if name in own:
            continue
        if name.endswith(".safetensors"):
            ignored[name] = stat, "weights that are no part of the model"
        elif name == ADAPTER_CONFIG and ADAPTER not in read:
            ignored[name] = stat, "describes an adapter, which is left behind"
        elif name.endswith((*OTHER_WEIGHTS, ".safetensors.index.json")):
            ignored[name] = stat, "weights in another format"
        elif name.endswith(".partial"):
            ignored[name] = stat, "an unfinished file"
        else:
            side_files[name] = stat
    return side_files, ignored


def take_pointers(storage: Storage, side_files: dict[str, FileStat]) -> list[Fault]:
    """Take files that Git LFS has not fetched out of those to carry over; return a fault for each.

    A pointer is a text of some 130 bytes: only files of about that size are looked into.
    """
    faults = []
    for name, stat in [*side_files.items()]:
        if stat.size not in LFS_POINTER_BYTES:
            continue
        if pointer := lfs_pointer(storage.read(name, 0, stat.size)):
            del side_files[name]
            faults.append(Fault("pointer", pointer, name, fatal=name.endswith(_NEEDED)))
    return faults
