"""Hugging Face checkpoints in safetensors: the CheckpointFormat value."""

import json
from collections.abc import Callable, Iterator, Sequence

from lingconv.containers.base import (
    SHARED,
    ClosingFiles,
    CrcOf,
    FileBytes,
    Identity,
    Match,
    Placement,
    PlacementRequest,
)
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.hf import safetensors
from lingconv.containers.hf.identify import identify
from lingconv.containers.hf.reader import SafetensorsReader
from lingconv.containers.hf.writer import index_json, pack_safetensors
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.encodings import Encoding, quantization_config
from lingconv.encodings.dtypes import DType
from lingconv.encodings.four_bits_config import MODELOPT, MODELOPT_FILE, modelopt_file
from lingconv.errors import UsageError
from lingconv.model.family import Family
from lingconv.plans.options import DEFAULT_SHARD_BYTES, ConvertOptions, Target
from lingconv.plans.plan import OutputFile, Plan
from lingconv.storage import Storage


class Safetensors:
    """safetensors shards beside an index and a config.json."""

    name = "safetensors"
    layouts: tuple[str, ...] = (Target.HF, Target.HF_MERGED)
    options_field = ""
    is_self_contained = False
    sums_elements = False

    def detect(self, storage: Storage, file: str) -> Match | None:
        """Return a match where there is a safetensors file, or an index of some."""
        own = (".safetensors", safetensors.INDEX_NAME)
        found = not file and any(name.endswith(own) for name in storage.files())
        return Match(SHARED) if found else None

    def read(self, storage: Storage, place: str, overrides: SourceOverrides) -> Checkpoint:
        """Read the headers of all shards."""
        if overrides.main_params:
            raise UsageError(f"`main_params`: {storage.uri} is not Megatron's torch_dist")
        return SafetensorsReader(storage).read()

    def identify(
        self, checkpoint: Checkpoint, families: Sequence[Family], overrides: SourceOverrides
    ) -> Identity:
        """Return the model that config.json describes."""
        return identify(checkpoint, families, overrides)

    def check(self, options: ConvertOptions) -> None:
        """Accept all options: those of other formats are refused by whoever plans."""

    def holds(self, encoding: Encoding) -> bool:
        """Return whether all tensors of an encoding have a dtype of safetensors."""
        return all(isinstance(kind, DType) for kind in encoding.stored_types)

    def place(self, request: PlacementRequest) -> Placement:
        """Return shards of at most `max_shard_bytes`."""
        limit = request.options.max_shard_bytes or DEFAULT_SHARD_BYTES
        return Placement(pack_safetensors(request.transfers, limit))

    def frames(self, file: OutputFile) -> Iterator[FileBytes]:
        """Yield the header."""
        yield FileBytes(0, safetensors.build_header(file.tensors))

    def seals(self, file: OutputFile, crc_of: CrcOf) -> Sequence[FileBytes]:
        """Return nothing: safetensors states no checksums."""
        return ()

    def closing_files(self, plan: Plan) -> ClosingFiles:
        """Return the index, which a single file does not need, and ModelOpt's own config."""
        before: dict[str, Callable[[], bytes]] = {}
        stated = plan.config.get(quantization_config.KEY, {})
        if stated.get("quant_method") == MODELOPT:
            own = modelopt_file(stated)
            before[MODELOPT_FILE] = lambda: f"{json.dumps(own, indent=2)}\n".encode()
        if [file.name for file in plan.files] != [safetensors.SINGLE_NAME]:
            before[safetensors.INDEX_NAME] = lambda: index_json(plan)
        return ClosingFiles(before=before)


SAFETENSORS = Safetensors()
