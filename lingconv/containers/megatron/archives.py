"""The archives in a file of Megatron: one for each chunk of torch_dist, one for a rank."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lingconv.containers.base import CrcOf, FileBytes
from lingconv.containers.megatron.args import common_state
from lingconv.containers.megatron.pickles import dumps, tensor
from lingconv.containers.megatron.torch_archive import Archive, build_archive, patches
from lingconv.encodings.dtypes import DTYPES, DType
from lingconv.encodings.tensor_spec import TensorSpec
from lingconv.plans.plan import OutputFile


def archives(file: OutputFile) -> Iterator[Archive]:
    """Yield the archives of a file in their order."""
    if file.state is not None:
        yield rank_archive(file.tensors, file.state)
        return
    start = 0
    for spec in file.tensors:
        archive = chunk_archive(start, DTYPES[spec.dtype.value], spec.shape)
        start = archive.end
        yield archive


def rank_archive(specs: Sequence[TensorSpec], state: Mapping[str, Any]) -> Archive:
    """Return the archive that a rank of Megatron saves: its model chunks, and its arguments.

    Names are `CHUNK/NAME`; modules without a state of their own have None for it.
    """
    chunks: dict[str, dict[str, Any]] = {
        key: {f"{module}._extra_state": None for module in modules}
        for key, modules in state["modules"].items()
    }
    for number, spec in enumerate(specs):
        key, _, name = spec.name.partition("/")
        chunks[key][name] = tensor(DTYPES[spec.dtype.value], spec.shape, str(number))
    storages = {str(number): spec.nbytes for number, spec in enumerate(specs)}
    return build_archive(0, dumps({**common_state(state["args"]), **chunks}), storages)


def chunk_archive(start: int, dtype: DType, shape: tuple[int, ...]) -> Archive:
    """Return the archive of one tensor, as torch.save writes it, from byte `start` on."""
    key = "0"
    return build_archive(start, dumps(tensor(dtype, shape, key)), {key: dtype.nbytes_of(shape)})


def archive_frames(file: OutputFile) -> Iterator[FileBytes]:
    """Yield what is around the elements of all archives; checksums of elements are zeros."""
    for archive in archives(file):
        yield from archive.parts


def archive_seals(file: OutputFile, crc_of: CrcOf) -> list[FileBytes]:
    """Return the checksums of all elements, at the places where archives keep them."""
    checked = [item for archive in archives(file) for item in archive.checked]
    return patches(checked, lambda item: crc_of(item.offset, item.nbytes))
