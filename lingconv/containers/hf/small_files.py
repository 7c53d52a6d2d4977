"""The small files of a checkpoint: which are carried over, and how JSON among them is read."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from lingconv.containers.hf import safetensors
from lingconv.errors import Fault
from lingconv.storage import FileStat, Storage
from lingconv.storage.file_names import CONFIG_NAME, RECORD_NAME

MAX_JSON_BYTES = 250_000_000  # the Hub's own limit for an index (huggingface.js)


# Weights in formats that the reader does not take here: never carried over as small files.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp", ".onnx", ".h5", ".msgpack")


def read_json(storage: Storage, name: str, faults: list[Fault]) -> dict[str, Any]:
    """Return the JSON object in a file that is there, or an empty one and a fault."""
    if storage.stat(name).size > MAX_JSON_BYTES:
        faults.append(Fault("json", "is too large to be true", name))
        return {}
    try:
        value = json.loads(storage.read(name))
    except (ValueError, RecursionError) as exc:
        faults.append(Fault("json", f"is not JSON: {exc}", name))
        return {}
    if not isinstance(value, dict):
        faults.append(Fault("json", "is not a JSON object", name))
        return {}
    return value


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
            ignored[name] = stat, "weights that the index does not name"
        elif name.endswith((*OTHER_WEIGHTS, ".safetensors.index.json")):
            ignored[name] = stat, "weights in another format"
        elif name.endswith(".partial"):
            ignored[name] = stat, "an unfinished file"
        else:
            side_files[name] = stat
    return side_files, ignored
