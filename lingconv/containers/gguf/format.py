"""GGUF: the CheckpointFormat value."""

from collections.abc import Iterator, Sequence

from lingconv.containers.base import (
    EXPLICIT,
    FALLBACK,
    ClosingFiles,
    CrcOf,
    FileBytes,
    Identity,
    Match,
    Placement,
    PlacementRequest,
)
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.gguf.header import build_header
from lingconv.containers.gguf.identify import identify
from lingconv.containers.gguf.reader import GgufReader, models_in
from lingconv.containers.gguf.writer import pack_gguf
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.encodings import Encoding
from lingconv.encodings.ggml_ftype import FileType
from lingconv.errors import UsageError
from lingconv.model.family import Family
from lingconv.plans.key_values import Value, ValueType
from lingconv.plans.options import AUTO, ConvertOptions, Mtp, Target
from lingconv.plans.plan import OutputFile, Plan, Transfer
from lingconv.storage import Storage

_AVERAGE_KEY = "lingconv.average"


class GgufFiles:
    """One GGUF file or a split, with config and tokenizer inside."""

    name = "gguf"
    layouts: tuple[str, ...] = (Target.GGUF,)
    options_field = "gguf"
    is_self_contained = True
    sums_elements = False

    def detect(self, storage: Storage, file: str) -> Match | None:
        """Return a match for the file that was named, or for what a folder holds."""
        if file:
            return Match(EXPLICIT, (file,))
        models = models_in(storage.files())
        return Match(FALLBACK, tuple(models)) if models else None

    def read(self, storage: Storage, place: str, overrides: SourceOverrides) -> Checkpoint:
        """Read the headers of a file, and of all files of its split."""
        if overrides.main_params:
            raise UsageError(f"`main_params`: {storage.uri} is not Megatron's torch_dist")
        return GgufReader(storage, place).read()

    def identify(
        self, checkpoint: Checkpoint, families: Sequence[Family], overrides: SourceOverrides
    ) -> Identity:
        """Return the model that the key-values describe."""
        return identify(checkpoint, families)

    def check(self, options: ConvertOptions) -> None:
        """Raise UsageError for a dtype of all weights, and for MTP layers alone."""
        if options.dtype:
            raise UsageError(
                "a GGUF file's types are chosen by `outtype`, not by `dtype`",
                hint=f"one of {', '.join([AUTO, *FileType])}",
            )
        if options.mtp == Mtp.ONLY:
            raise UsageError("llama.cpp has no model that is MTP layers alone")

    def holds(self, encoding: Encoding) -> bool:
        """Return whether ggml has the type: it has no scales in tensors of their own."""
        return not encoding.has_scales

    def place(self, request: PlacementRequest) -> Placement:
        """Return one file, or a split, with the key-values that llama.cpp's converter writes."""
        # With gguf-py, numpy and the tokenizer's library, which nothing else of planning needs.
        from lingconv.containers.gguf.metadata import GgufTarget, describe, file_stem

        mix = request.file_type or FileType.BF16
        metadata, notes = describe(
            request.checkpoint,
            request.family,
            request.architecture,
            GgufTarget(request.layout, request.symbols, mix.file_type),
            request.options.gguf,
        )
        if request.average:  # no record lies beside a GGUF file
            metadata[_AVERAGE_KEY] = Value(ValueType.STRING, request.average)
        files = pack_gguf(
            request.transfers,
            metadata,
            request.options.gguf.stem or file_stem(metadata, mix),
            max_shard_bytes=request.options.max_shard_bytes,
            max_tensors=request.options.gguf.max_shard_tensors,
        )
        return Placement(files, notes=(*notes, *_rounded_twice(request.transfers)))

    def frames(self, file: OutputFile) -> Iterator[FileBytes]:
        """Yield the header: key-values and the table of tensors."""
        yield FileBytes(0, build_header(file.metadata or {}, file.tensors))

    def seals(self, file: OutputFile, crc_of: CrcOf) -> Sequence[FileBytes]:
        """Return nothing: GGUF states no checksums."""
        return ()

    def closing_files(self, plan: Plan) -> ClosingFiles:
        """Return nothing: everything is inside."""
        return ClosingFiles()


def _rounded_twice(transfers: Sequence[Transfer]) -> Iterator[str]:
    """Yield a note when weights that have scales are quantized once more."""
    again = sum(
        transfer.target.encoding.is_quantized
        and any(segment.source.encoding.has_scales for segment in transfer.segments)
        for transfer in transfers
    )
    if again:
        yield (
            f"{again} tensors are quantized from FP8, dequantized to BF16 first: a conversion from"
            " the BF16 original loses less"
        )


GGUF_FILES = GgufFiles()
