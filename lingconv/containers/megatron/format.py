"""Megatron: the CheckpointFormat values of torch_dist and of legacy per-rank files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lingconv.containers.base import (
    OWN,
    ClosingFiles,
    CrcOf,
    FileBytes,
    Identity,
    Match,
    Placement,
    PlacementRequest,
)
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.megatron import closing_files as closing
from lingconv.containers.megatron.archives import archive_frames, archive_seals
from lingconv.containers.megatron.args import ITERATION, megatron_args, module_states
from lingconv.containers.megatron.closing_files import ITERATION_FOLDER
from lingconv.containers.megatron.dcp_metadata import (
    COMMON_NAME,
    FORMAT,
    FORMAT_NAME,
    METADATA_NAME,
    write_metadata,
)
from lingconv.containers.megatron.dcp_writer import pack_torch_dist
from lingconv.containers.megatron.identify import identify
from lingconv.containers.megatron.rank_assembly import names_of_ranks
from lingconv.containers.megatron.rank_writer import place_on_ranks
from lingconv.containers.megatron.reader import TRACKER_NAME, find_iteration, read_megatron
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.encodings import Encoding
from lingconv.errors import UsageError
from lingconv.model.family import Family
from lingconv.model.parallelism import Parallel
from lingconv.model.symbol_rules import megatron_notes
from lingconv.plans.options import (
    DISTCP_BYTES,
    ConvertOptions,
    ExpertNames,
    Mtp,
    MtpModule,
    Spec,
    Target,
    TargetDType,
)
from lingconv.plans.plan import OutputFile, Plan
from lingconv.storage import Storage


class _Megatron:
    """What both formats have in common."""

    options_field = "megatron"
    is_self_contained = False
    sums_elements = True

    def identify(
        self, checkpoint: Checkpoint, families: Sequence[Family], overrides: SourceOverrides
    ) -> Identity:
        """Return the model that arguments, a config.json or shapes describe."""
        return identify(checkpoint, families, overrides)

    def holds(self, encoding: Encoding) -> bool:
        """Return whether an encoding is one plain tensor."""
        return not encoding.is_quantized

    def frames(self, file: OutputFile) -> Iterator[FileBytes]:
        """Yield everything of the archives but their elements and checksums."""
        return archive_frames(file)

    def seals(self, file: OutputFile, crc_of: CrcOf) -> Sequence[FileBytes]:
        """Return the CRC-32 of all storages, at the places where zip keeps them."""
        return archive_seals(file, crc_of)

    def _check_common(self, options: ConvertOptions) -> None:
        """Raise UsageError for what Megatron does not have in any format."""
        if options.dtype == TargetDType.FP8:
            raise UsageError(
                "Megatron's checkpoints hold no FP8 weights with scales",
                hint="leave `dtype` out: FP8 is dequantized to BF16",
            )
        if options.mtp == Mtp.ONLY:
            raise UsageError("Megatron has no model that is MTP layers alone")


class TorchDist(_Megatron):
    """torch_dist: chunks of global tensors in .distcp files, with a .metadata of them."""

    name = "torch_dist"
    layouts: tuple[str, ...] = (Target.MEGATRON,)

    def detect(self, storage: Storage, file: str) -> Match | None:
        """Return the folder of the iteration that is the latest."""
        place = None if file else find_iteration(storage)
        if place is None or _has_ranks(storage, place):
            return None
        return Match(OWN, (place,))

    def read(self, storage: Storage, place: str, overrides: SourceOverrides) -> Checkpoint:
        """Read .metadata, common.pt, and where the chunks are in their archives."""
        return read_megatron(storage, place, main_params=overrides.main_params)

    def check(self, options: ConvertOptions) -> None:
        """Raise UsageError for numbers of ranks, and for what Megatron does not have."""
        if options.megatron.parallel != Parallel():
            raise UsageError(
                "torch_dist is loaded at any parallelism: it has no numbers of ranks",
                hint="leave them out, or write `layout=megatron-ranks`",
            )
        if options.megatron.mtp_module != MtpModule.TRANSFORMER_LAYER:
            raise UsageError(
                "torch_dist names MTP layers alike for every version of Megatron",
                hint="leave `mtp_module` out, or write `layout=megatron-ranks`",
            )
        self._check_common(options)

    def place(self, request: PlacementRequest) -> Placement:
        """Return .distcp files of about `max_shard_bytes`."""
        limit = request.options.max_shard_bytes or DISTCP_BYTES
        megatron = request.family.megatron
        states = module_states(request.layout, megatron.state_beside) if megatron else ()
        return Placement(
            pack_torch_dist(request.transfers, limit, ITERATION_FOLDER),
            args=_args(request),
            states=states,
            notes=tuple(megatron_notes(request.symbols)),
        )

    def closing_files(self, plan: Plan) -> ClosingFiles:
        """Return the modules' states, common.pt, metadata.json and .metadata; the tracker last."""
        states = closing.EMPTY_STATE * closing.num_states(plan)
        own = {
            closing.STATES_NAME: lambda: states,
            COMMON_NAME: lambda: closing.common(plan),
            FORMAT_NAME: lambda: json.dumps(FORMAT).encode(),
            METADATA_NAME: lambda: write_metadata(
                closing.tensors_of(plan), closing.objects_of(plan)
            ),
        }
        before = {ITERATION_FOLDER + name: maker for name, maker in own.items()}
        return ClosingFiles(before, _tracker())


class RankFiles(_Megatron):
    """Legacy per-rank checkpoints: `mp_rank_*/model_optim_rng.pt`."""

    name = "torch"
    layouts: tuple[str, ...] = (Target.RANKS,)

    def detect(self, storage: Storage, file: str) -> Match | None:
        """Return the folder of the iteration that is the latest."""
        place = None if file else find_iteration(storage)
        if place is None or not _has_ranks(storage, place):
            return None
        return Match(OWN, (place,))

    def read(self, storage: Storage, place: str, overrides: SourceOverrides) -> Checkpoint:
        """Read the pickles of all ranks."""
        return read_megatron(storage, place, main_params=overrides.main_params)

    def check(self, options: ConvertOptions) -> None:
        """Raise UsageError for what per-rank files cannot say."""
        grouped = options.megatron.experts == ExpertNames.GROUPED
        if grouped and options.megatron.spec == Spec.LOCAL:
            raise UsageError(
                "Megatron's local layers have no grouped experts", hint="add `experts=sequential`"
            )
        if options.megatron.singleton_experts:
            raise UsageError("`singleton_experts` is for torch_dist: `layout=megatron`")
        if options.max_shard_bytes is not None:
            raise UsageError("the files of ranks are not cut: leave `max_shard_bytes` out")
        self._check_common(options)

    def place(self, request: PlacementRequest) -> Placement:
        """Return a file for each rank."""
        args = _args(request)
        files = place_on_ranks(
            request.family,
            request.symbols,
            request.options.megatron,
            args,
            request.transfer_of,
        )
        return Placement(files, args=args, notes=tuple(self._notes(request)))

    def _notes(self, request: PlacementRequest) -> Iterator[str]:
        yield from megatron_notes(request.symbols)
        older = request.options.megatron.mtp_module == MtpModule.TRANSFORMER_LAYER
        if older and request.symbols["mtp_layers"]:
            yield (
                "MTP layers have the names of megatron-core up to 0.16: 0.17 and later load them"
                " from ranks that are written with `mtp_module=mtp_model_layer`"
            )

    def closing_files(self, plan: Plan) -> ClosingFiles:
        """Return the tracker, behind everything else."""
        return ClosingFiles(after=_tracker())


def _has_ranks(storage: Storage, place: str) -> bool:
    inside = (name.removeprefix(place) for name in storage.files() if name.startswith(place))
    return any(True for _ in names_of_ranks(inside))


def _args(request: PlacementRequest) -> dict[str, Any]:
    return megatron_args(request.family, request.symbols, request.options)


def _tracker() -> Mapping[str, Any]:
    return {TRACKER_NAME: lambda: f"{ITERATION}\n".encode()}


TORCH_DIST = TorchDist()
RANK_FILES = RankFiles()
