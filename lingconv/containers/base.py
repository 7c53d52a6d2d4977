"""`CheckpointFormat`: what a format of checkpoints has to answer, and the values it answers with.

A format is one value in `containers/NAME/format.py`; `registry.py` finds it. Planning calls all of
this, so that no format may import numpy, torch or a client of the Hub before it needs them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.encodings import Encoding
from lingconv.encodings.ggml_ftype import FileType
from lingconv.model.family import Family
from lingconv.model.layout import Layout, PhysicalTensor
from lingconv.plans.options import ConvertOptions
from lingconv.plans.plan import OutputFile, Plan, Transfer
from lingconv.storage import Storage

# Returns the CRC-32 of bytes of a file that have been written: (offset, nbytes) -> sum.
CrcOf = Callable[[int, int], int]
# Makes the contents of a small file, when they are needed.
Maker = Callable[[], bytes]


class FileBytes(NamedTuple):
    """Bytes of a file, and the offset in it where they stand."""

    offset: int
    data: bytes


class Match(NamedTuple):
    """What a format found in a storage: how sure it is, and where its checkpoints are.

    The highest `score` of the built-in formats wins, those of other packages are asked where none
    of these finds anything: EXPLICIT for a file that was named, OWN for files that only this
    format writes, SHARED for files that may lie beside another format's, FALLBACK for files that
    are read where there is nothing else. A place is the format's own word: a file's name, the
    folder of an iteration, or nothing for the storage itself.
    """

    score: int
    places: tuple[str, ...] = ("",)


EXPLICIT, OWN, SHARED, FALLBACK = 4, 3, 2, 1


@dataclass(frozen=True, slots=True)
class Identity:
    """What a checkpoint says that it is: its model, and the layout that its names are in.

    `checkpoint` is the one that was read, shown with the config.json, the small files and the
    tensors of a Hugging Face checkpoint where the format keeps them in another form.
    """

    checkpoint: Checkpoint
    family: Family
    architecture: str
    symbols: Mapping[str, Any]
    layout: Layout


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What is to be placed in files: the model, its layout, and a transfer for each tensor.

    `transfer_of` plans a tensor of another layout, for formats that cut the model up. `file_type`
    is llama.cpp's word for the types of a GGUF file; `average` says what was averaged, in words.
    """

    checkpoint: Checkpoint
    family: Family
    architecture: str
    symbols: Mapping[str, Any]
    layout: Layout
    options: ConvertOptions
    transfers: Sequence[Transfer]
    transfer_of: Callable[[PhysicalTensor], Transfer]
    file_type: FileType | None = None
    average: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Files in which every byte has its place, and what the plan has to keep besides them.

    `args` are Megatron's arguments, `states` the keys of module states in torch_dist with the
    number of their shards, `notes` what the user should know.
    """

    files: tuple[OutputFile, ...]
    args: Mapping[str, Any] | None = None
    states: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClosingFiles:
    """The small files of a format itself, in the order in which they are written.

    `before` come ahead of record, card and config.json, `after` behind them: the very last file
    is the one that makes loaders take the folder for a checkpoint.
    """

    before: Mapping[str, Maker] = field(default_factory=dict)
    after: Mapping[str, Maker] = field(default_factory=dict)


class CheckpointFormat(Protocol):
    """A format of checkpoints, read and written.

    `name` stands in plans as the container of a file. `layouts` are the values of `--to` that write
    it. `options_field` is the field of ConvertOptions that is for this format alone, or empty.
    `is_self_contained` says that config and tokenizer are inside the weight files;
    `sums_elements` that the file states checksums of its elements.
    """

    name: str
    layouts: tuple[str, ...]
    options_field: str
    is_self_contained: bool
    sums_elements: bool

    def detect(self, storage: Storage, file: str) -> Match | None:
        """Return what of this format is in a storage, by names alone; `file` is one that was named.

        Raises CheckpointError when there is something of it that cannot be meant.
        """

    def read(self, storage: Storage, place: str, overrides: SourceOverrides) -> Checkpoint:
        """Read the headers of the checkpoint at a place that `detect` found.

        What is wrong with single files or tensors is a fault of the checkpoint. Raises
        CheckpointError when nothing can be read, UsageError for overrides that are for others.
        """

    def identify(
        self, checkpoint: Checkpoint, families: Sequence[Family], overrides: SourceOverrides
    ) -> Identity:
        """Return which model a checkpoint holds; raise CheckpointError when it cannot be told."""

    def check(self, options: ConvertOptions) -> None:
        """Raise UsageError for options that this format cannot carry out."""

    def holds(self, encoding: Encoding) -> bool:
        """Return whether tensors in an encoding can be stored."""

    def place(self, request: PlacementRequest) -> Placement:
        """Return the files of a target; raise UsageError when it cannot be stored like that."""

    def frames(self, file: OutputFile) -> Iterable[FileBytes]:
        """Return the bytes of a file that are known before its elements: headers, directories."""

    def seals(self, file: OutputFile, crc_of: CrcOf) -> Iterable[FileBytes]:
        """Return the bytes of a file that follow from its elements: checksums."""

    def closing_files(self, plan: Plan) -> ClosingFiles:
        """Return the small files that make the weights of a plan a checkpoint of this format."""
