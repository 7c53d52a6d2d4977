"""The tensors of all files of a checkpoint, each name once."""

from collections.abc import Iterable

from lingconv.containers import StoredTensor
from lingconv.errors import Fault


def add_tensors(
    tensors: dict[str, StoredTensor], found: Iterable[StoredTensor], faults: list[Fault]
) -> None:
    """Add the tensors of one more file; one that is there already is a fault."""
    for tensor in found:
        twin = tensors.get(tensor.name)
        if twin is not None:
            message = f"is in {twin.file} too"
            faults.append(Fault("duplicate tensor", message, tensor.file, tensor.name))
            continue
        tensors[tensor.name] = tensor
