"""Builds a Plan from recognised checkpoints and the user's options, or refuses with every reason.

Pure: headers in, Plan out. `choosing` says which encoding a tensor gets, `packing` where it goes;
the `ledger` makes sure that nothing is lost.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.containers.gguf.writer import pack_gguf
from lingconv.containers.hf.writer import pack_safetensors
from lingconv.containers.megatron.args import megatron_args, module_states
from lingconv.containers.megatron.closing_files import ITERATION_FOLDER
from lingconv.containers.megatron.dcp_writer import pack_torch_dist
from lingconv.containers.megatron.rank_writer import place_on_ranks
from lingconv.encodings import Fp8, Ggml
from lingconv.encodings.name_pattern import Pattern, among
from lingconv.errors import CheckpointError, Fault, UsageError
from lingconv.model.layout import HF, Layout, PhysicalTensor, build_layout
from lingconv.model.symbol_rules import megatron_notes
from lingconv.planner.coverage import check_sources, check_targets, dropped
from lingconv.planner.encoding_choice import EncodingChoice
from lingconv.planner.sources import Average, Sources, refuse_all_faults
from lingconv.planner.target_config import target_config
from lingconv.plans.key_values import Value, ValueType
from lingconv.plans.options import DEFAULT_SHARD_BYTES, DISTCP_BYTES, ConvertOptions, Mtp, Target
from lingconv.plans.plan import Dropped, OutputFile, Plan, Term, Transfer
from lingconv.plans.tensor_map import StoredMatrix
from lingconv.storage.file_names import CARD_NAME

_AVERAGE_KEY = "lingconv.average"


def build_plan(model: Model, options: ConvertOptions) -> Plan:
    """Return the plan that turns `model` into what `options` ask for.

    Raises UsageError when the request does not fit the model, and CheckpointError with the list of
    all faults when the checkpoint cannot be trusted.
    """
    return build_average(Average((model,)), options)


def build_average(average: Average, options: ConvertOptions) -> Plan:
    """Return the plan that turns the average of checkpoints into what `options` ask for.

    Raises the same errors; that the checkpoints are those of one model is up to the caller.
    """
    family = average.base.family
    options.check(family.scale_policies, family.merged)
    return _Planner(average, options).build()


class _Planner:
    def __init__(self, average: Average, options: ConvertOptions) -> None:
        self.average = average
        self.model = average.base
        self.options = options
        self.symbols, self.layout = _target_layout(self.model, options)
        extra = {f.tensor for m in average.models for f in m.faults if f.kind == "extra tensor"}
        self.drop = among(map(Pattern, options.drop), extra)
        self.exclude = among(map(Pattern, options.exclude), self.layout.tensors)
        self.chooser = EncodingChoice(self.model, self.layout, self.symbols, options)
        self.origins = Sources(average)
        self.notes: list[str] = []
        self.args = self._args()

    def build(self) -> Plan:
        refuse_all_faults(self.average.models, self._excused)
        extra = [fault.tensor for fault in self.model.faults if fault.kind == "extra tensor"]
        self.chooser.check_patterns(extra)
        transfers = self._transfers()
        left_out = self._check_ledger(transfers)
        return Plan(
            sources=self.average.sources(),
            weighting=self.average.weighting,
            family=self.model.family.name,
            options=self.options,
            args=self.args,
            states=self._states(),
            files=self._pack(transfers),
            side_files=self._side_files(),
            config=self._config(transfers),
            dropped=left_out,
            total_parameters=sum(prod(transfer.target.shape) for transfer in transfers),
            warnings=(*self._warnings(), *self.notes),
        )

    def _warnings(self) -> Iterator[str]:
        """Yield what is odd about the checkpoints, the same oddity once."""
        odd = (str(f) for model in self.average.models for f in model.faults if not f.fatal)
        yield from dict.fromkeys(odd)

    def _config(self, transfers: list[Transfer]) -> dict[str, Any]:
        """Return config.json; a GGUF file has its metadata instead."""
        if self.chooser.mix:
            return {}
        return target_config(self.model, self.layout, self.options, transfers)

    def _pack(self, transfers: list[Transfer]) -> tuple[OutputFile, ...]:
        """Return the files of the target, in the container of its layout."""
        limit = self.options.max_shard_bytes
        if self.options.layout == Target.RANKS:
            args, megatron = self.args or {}, self.options.megatron
            return place_on_ranks(self.model.family, self.symbols, megatron, args, self._transfer)
        if self.options.layout == Target.MEGATRON:
            return pack_torch_dist(transfers, limit or DISTCP_BYTES, ITERATION_FOLDER)
        mix = self.chooser.mix
        if mix is None:
            return pack_safetensors(transfers, limit or DEFAULT_SHARD_BYTES)
        # With gguf-py, numpy and the tokenizer's library, which nothing else of planning needs.
        from lingconv.containers.gguf.metadata import GgufTarget, describe, file_stem

        request, model = self.options.gguf, self.model
        target = GgufTarget(self.layout, self.symbols, mix.file_type)
        metadata, notes = describe(
            model.checkpoint, model.family, model.architecture, target, request
        )
        if self.average.weighting:
            metadata[_AVERAGE_KEY] = Value(ValueType.STRING, self._in_words())
        self.notes += [*notes, *_lossy(transfers)]
        return pack_gguf(
            transfers,
            metadata,
            request.stem or file_stem(metadata, mix),
            max_shard_bytes=limit,
            max_tensors=request.max_shard_tensors,
        )

    def _in_words(self) -> str:
        """Return what is averaged, for the metadata of a GGUF file, beside which no record lies."""
        sources = (f"{s.weight:.9g} {s.uri} {s.revision}".strip() for s in self.average.sources())
        return f"{self.average.weighting}: {'; '.join(sources)}"

    def _args(self) -> dict[str, Any] | None:
        """Return the arguments of a target in Megatron's format; other targets have none."""
        if not self.options.is_megatron:
            return None
        self.notes += megatron_notes(self.symbols)
        return megatron_args(self.model.family, self.symbols, self.options)

    def _states(self) -> tuple[tuple[str, int], ...]:
        """Return the modules' states that Megatron expects in torch_dist, all of them empty."""
        megatron = self.model.family.megatron
        if self.options.layout != Target.MEGATRON or megatron is None:
            return ()
        return module_states(self.layout, megatron.state_beside)

    def _side_files(self) -> dict[str, int]:
        """Return the small files to carry over: a GGUF file holds all that it needs itself."""
        if self.chooser.mix:
            return {}
        carried = {name: stat.size for name, stat in self.model.checkpoint.side_files.items()}
        if self.average.weighting:
            carried.pop(CARD_NAME, None)  # a new one is made of it
        return carried

    def _excused(self, model: Model, fault: Fault) -> bool:
        """Return whether the user's options make a fault harmless."""
        if fault.kind == "extra tensor":
            return fault.tensor in self.drop
        tensor = model.tensor(fault.tensor)
        left_out = self.options.mtp == Mtp.DROP and tensor is not None and tensor.mtp
        return left_out and fault.kind == "missing tensor"

    def _transfers(self) -> list[Transfer]:
        transfers = []
        faults: list[Fault] = []
        for tensor in self.layout.tensors.values():
            try:
                transfers.append(self._transfer(tensor))
            except ValueError as exc:
                source = self.origins.terms(tensor)[-1].segments[0].source
                faults.append(Fault("dtype", str(exc), source.first_extent.file, tensor.name))
        if faults:
            raise CheckpointError("some tensors cannot be converted", faults=faults)
        return transfers

    def _transfer(self, tensor: PhysicalTensor) -> Transfer:
        terms = self._terms(tensor)
        is_average = len(terms) > 1 or len(terms[0].sources) > 1
        encoding, scaling, copies = self.chooser.choose(tensor, terms, is_average=is_average)
        pitch, shape = (tensor.height, tensor.stored_shape) if tensor.turned else (0, ())
        stored = StoredMatrix(
            tensor.name, tensor.shape, encoding, (), tensor.stack, (), pitch, shape
        )
        return Transfer(stored, terms, scaling, copies)

    def _terms(self, tensor: PhysicalTensor) -> tuple[Term, ...]:
        """Return what a tensor is made of: all checkpoints, or the base where it is excluded."""
        if tensor.name in self.exclude:
            return self.origins.base_terms(tensor)
        return self.origins.terms(tensor)

    def _check_ledger(self, transfers: list[Transfer]) -> tuple[Dropped, ...]:
        """Make sure that all is read or dropped, and return what is dropped."""
        check_targets(transfers)
        found: list[Dropped] = []
        for origin in self.origins:
            left_out = list(dropped(origin, self.layout))
            check_sources(origin, self.layout, transfers, left_out)
            found += left_out
        return (*found, *self._excluded(transfers))

    def _excluded(self, transfers: list[Transfer]) -> Iterator[Dropped]:
        """Yield what is not read because the base's is taken as it is."""
        others = len(self.average.models) - 1
        for transfer in transfers if others else ():
            if not transfer.is_average:
                nbytes = sum(segment.nbytes for segment in transfer.segments)
                reason = "taken from the last checkpoint: `--exclude`"
                yield Dropped(transfer.target.name, nbytes * others, reason)


def _lossy(transfers: Iterable[Transfer]) -> Iterator[str]:
    """Yield a note when FP8 weights are rounded a second time."""
    again = sum(
        isinstance(transfer.target.encoding, Ggml)
        and any(isinstance(segment.source.encoding, Fp8) for segment in transfer.segments)
        for transfer in transfers
    )
    if again:
        yield (
            f"{again} tensors are quantized from FP8, dequantized to BF16 first: a conversion from"
            " the BF16 original loses less"
        )


def _target_layout(model: Model, options: ConvertOptions) -> tuple[Mapping[str, Any], Layout]:
    """Return the target's symbols and layout: the source's model, but for what `--mtp` changes."""
    if options.mtp == Mtp.KEEP and options.layout_name == model.layout.name:
        return model.symbols, model.layout
    overrides = {
        Mtp.KEEP: {"layers": model.symbols["layers"]},
        Mtp.DROP: {"mtp_layers": 0, "layers": model.symbols["layers"]},
        Mtp.ONLY: {"layers": 0},
    }
    if options.mtp == Mtp.ONLY and not model.symbols["mtp_layers"]:
        raise UsageError("`--mtp only`: the source has no MTP layers")
    symbols = model.family.resolve(model.checkpoint.config, HF, overrides[Mtp(options.mtp)])
    return symbols, build_layout(model.family, symbols, options.layout_name)
