"""From stored files to a Checkpoint: a module for each container.

Opening never fails on a broken file: everything wrong or odd is a Fault, so that `inspect` can show
all of it and `plan` can refuse with the whole list.
"""

from dataclasses import replace
from pathlib import Path

from lingconv.checkpoint import Checkpoint
from lingconv.containers import gguf
from lingconv.errors import UsageError
from lingconv.hub.address import SCHEME, is_hub
from lingconv.provenance import find_revision
from lingconv.readers.gguf import GgufReader, models_in
from lingconv.readers.megatron import find_iteration, read_megatron
from lingconv.readers.safetensors import SafetensorsReader
from lingconv.storage import Storage
from lingconv.storage.local import LocalStorage
from lingconv.stores import is_object


def open_checkpoint(source: str | Path, *, main_params: bool = False) -> Checkpoint:
    """Read the headers of the checkpoint at a local path, or at an address on the Hub.

    `main_params` takes the optimizer's FP32 weights from Megatron's torch_dist. Raises UsageError
    when there is no such folder and CheckpointError when it holds no checkpoint.
    """
    storage, file = open_storage(source)
    if file:
        checkpoint = GgufReader(storage, file).read()
    else:
        checkpoint = read_checkpoint(storage, main_params=main_params)
    return replace(checkpoint, revision=find_revision(storage))


def open_storage(source: str | Path) -> tuple[Storage, str]:
    """Return the folder that `source` is or lies in, and its name there where it is a GGUF file.

    Raises UsageError when there is none.
    """
    if is_hub(source):
        from lingconv.storage import hub  # with huggingface_hub, which local work does not need

        return hub.open_address(str(source), gguf.SUFFIX)
    if is_object(source):
        from lingconv.storage.objects import ObjectStorage  # with fsspec and its client

        folder, _, name = str(source).rpartition("/")
        is_file = name.endswith(gguf.SUFFIX)
        return ObjectStorage(folder if is_file else str(source)), name if is_file else ""
    root = Path(source)
    if root.is_file() and root.suffix == gguf.SUFFIX:
        return LocalStorage(root.parent, str(source)), root.name
    if not root.is_dir():
        hint = ""
        if not root.is_absolute() and str(source).count("/") == 1:
            hint = f"for the Hub, write `{SCHEME}{source}`"
        raise UsageError(f"{source} is neither a folder nor a GGUF file", hint=hint)
    return LocalStorage(root), ""


def read_checkpoint(storage: Storage, *, main_params: bool = False) -> Checkpoint:
    """Read the headers of the weight files in `storage`: Megatron's, safetensors, or one GGUF."""
    iteration = find_iteration(storage)
    if iteration is not None:
        return read_megatron(storage, iteration, main_params=main_params)
    if main_params:
        raise UsageError(f"`--from-main-params`: {storage.uri} is not Megatron's torch_dist")
    names = list(storage.files())
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        models = models_in(names)
        if len(models) == 1:
            return GgufReader(storage, models[0]).read()
        if models:
            raise UsageError(
                f"{storage.uri} holds {len(models)} GGUF models",
                details=models[:10],
                hint="name the one to read",
            )
    return SafetensorsReader(storage).read()
