"""From stored files to a Checkpoint: a module for each container.

Opening never fails on a broken file: everything wrong or odd is a Fault, so that `inspect` can show
all of it and `plan` can refuse with the whole list.
"""

from dataclasses import replace
from pathlib import Path

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.gguf.reader import GgufReader, models_in
from lingconv.containers.hf.reader import SafetensorsReader
from lingconv.containers.megatron.reader import find_iteration, read_megatron
from lingconv.errors import UsageError
from lingconv.storage import Storage
from lingconv.storage.locations import open_storage
from lingconv.storage.provenance import find_revision


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
