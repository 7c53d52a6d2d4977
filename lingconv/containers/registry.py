"""The bytes around the elements of a weight file: headers, archives, checksums."""

from collections.abc import Callable, Iterator, Mapping

from lingconv.containers.base import FileBytes
from lingconv.containers.gguf.writer import _gguf_frames
from lingconv.containers.hf.writer import _safetensors_frames
from lingconv.containers.megatron.archives import _archive_frames, archives
from lingconv.containers.megatron.torch_archive import Checked, patches
from lingconv.plans.plan import Container, OutputFile


def frames(file: OutputFile) -> Iterator[FileBytes]:
    """Yield everything of a file that is known before its elements."""
    yield from _FRAMES[file.container](file)


def header(file: OutputFile) -> bytes:
    """Return the bytes before the elements of a file that has them all in a row."""
    (part,) = frames(file)
    return part.data


def seals(file: OutputFile, crc_of: Callable[[Checked], int]) -> list[FileBytes]:
    """Return what has to be written when all elements are there: the checksums of archives."""
    return patches([item for archive in archives(file) for item in archive.checked], crc_of)


_FRAMES: Mapping[Container, Callable[[OutputFile], Iterator[FileBytes]]] = {
    Container.SAFETENSORS: _safetensors_frames,
    Container.GGUF: _gguf_frames,
    Container.TORCH_DIST: _archive_frames,
    Container.TORCH: _archive_frames,
}
