"""The bytes around the elements of a weight file: headers, archives, checksums."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lingconv.containers import TensorSpec, gguf, safetensors
from lingconv.containers.pickles import dumps, tensor
from lingconv.containers.torch_archive import Archive, Checked, Part, build_archive, patches
from lingconv.dtypes import DTYPES, DType
from lingconv.metadata.megatron import common_state
from lingconv.plans import Container, OutputFile


def frames(file: OutputFile) -> Iterator[Part]:
    """Yield everything of a file that is known before its elements."""
    yield from _FRAMES[file.container](file)


def header(file: OutputFile) -> bytes:
    """Return the bytes before the elements of a file that has them all in a row."""
    (part,) = frames(file)
    return part.data


def seals(file: OutputFile, crc_of: Callable[[Checked], int]) -> list[Part]:
    """Return what has to be written when all elements are there: the checksums of archives."""
    return patches([item for archive in archives(file) for item in archive.checked], crc_of)


def archives(file: OutputFile) -> Iterator[Archive]:
    """Yield the archives of a file in their order."""
    if file.container == Container.TORCH_DIST:
        start = 0
        for spec in file.tensors:
            archive = chunk_archive(start, DTYPES[spec.dtype.value], spec.shape)
            start = archive.end
            yield archive
    elif file.container == Container.TORCH:
        yield rank_archive(file.tensors, file.state or {})


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


def _safetensors_frames(file: OutputFile) -> Iterator[Part]:
    yield Part(0, safetensors.build_header(file.tensors))


def _gguf_frames(file: OutputFile) -> Iterator[Part]:
    yield Part(0, gguf.build_header(file.metadata or {}, file.tensors))


def _archive_frames(file: OutputFile) -> Iterator[Part]:
    for archive in archives(file):
        yield from archive.parts


_FRAMES: Mapping[Container, Callable[[OutputFile], Iterator[Part]]] = {
    Container.SAFETENSORS: _safetensors_frames,
    Container.GGUF: _gguf_frames,
    Container.TORCH_DIST: _archive_frames,
    Container.TORCH: _archive_frames,
}
