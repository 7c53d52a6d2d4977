"""A Plan from recognised checkpoints and the user's options, or an error with all reasons.

No I/O: headers in, Plan out. `encoding_choice` chooses a tensor's encoding, the target's format its
place; `coverage` checks that no tensor is lost.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from lingconv.checkpoint.leftover_tensors import CALIBRATED
from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.containers.base import PlacementRequest
from lingconv.containers.registry import built_in, format_for
from lingconv.encodings import quantization_config
from lingconv.encodings.name_pattern import Pattern, among
from lingconv.errors import MATHEMATICS, CheckpointError, Fault, UsageError
from lingconv.model.family import Family, PhysicalName
from lingconv.model.layout import HF, Layout, PhysicalTensor, build_layout
from lingconv.planner.coverage import check_sources, check_targets, dropped
from lingconv.planner.encoding_choice import EncodingChoice
from lingconv.planner.runtime_limits import runtime_warnings
from lingconv.planner.sources import Average, Sources, refuse_all_faults
from lingconv.planner.target_config import target_config
from lingconv.plans.options import ConvertOptions, Mtp
from lingconv.plans.plan import Dropped, Plan, Term, Transfer
from lingconv.plans.tensor_map import StoredMatrix
from lingconv.storage.file_names import CARD_NAME

_AVERAGE_KEY = "lingconv.average"


def build_plan(model: Model, options: ConvertOptions) -> Plan:
    """Return the plan that converts `model` as `options` ask.

    Raises UsageError if the options do not fit the model, and CheckpointError with the list of all
    faults if the checkpoint has any.
    """
    return build_average(Average((model,)), options)


def build_average(average: Average, options: ConvertOptions) -> Plan:
    """Return the plan that converts the average of checkpoints as `options` ask.

    Raises the same errors. The caller checks that all are checkpoints of one model.
    """
    _check(options, average.base.family)
    return _Planner(average, options).build()


def _check(options: ConvertOptions, family: Family) -> None:
    """Raise UsageError for options that cannot be carried out, or are for other formats."""
    options.check(family.scale_policies, family.merged)
    chosen = format_for(options.layout)
    for form in built_in():
        if form.options_field and form.options_field != chosen.options_field:
            options.refuse_unused(form.options_field)
    chosen.check(options)


class _Planner:
    def __init__(self, average: Average, options: ConvertOptions) -> None:
        self.average = average
        self.model = average.base
        self.options = options
        self.symbols, self.layout = _target_layout(self.model, options)
        extra = {f.tensor for m in average.models for f in m.faults if f.kind == "extra tensor"}
        self.drop = among(map(Pattern, options.drop), extra)
        self.exclude = among(map(Pattern, options.exclude), self.layout.tensors)
        self.format = format_for(options.layout)
        self.choice = EncodingChoice(self.model, self.layout, self.symbols, options)
        self.sources = Sources(average)

    def build(self) -> Plan:
        refuse_all_faults(self.average.models, self._excused)
        self._refuse_other_mathematics()
        extra = [fault.tensor for fault in self.model.faults if fault.kind == "extra tensor"]
        self.choice.check_patterns(extra)
        transfers = self._transfers()
        left_out = self._check_coverage(transfers)
        placed = self.format.place(self._request(transfers))
        return Plan(
            sources=self.average.sources(),
            weighting=self.average.weighting,
            family=self.model.family.name,
            options=self.options,
            args=placed.args,
            states=placed.states,
            files=placed.files,
            side_files=self._side_files(),
            config=self._config(transfers),
            dropped=left_out,
            total_parameters=sum(prod(transfer.target.shape) for transfer in transfers),
            warnings=(
                *self._warnings(),
                *runtime_warnings(self.layout, transfers),
                *placed.notes,
            ),
        )

    def _refuse_other_mathematics(self) -> None:
        """Raise CheckpointError where a target has no keys for what the config asks for."""
        odd = [fault for fault in self.model.faults if fault.kind == MATHEMATICS]
        if odd and self.layout.base != HF:
            raise CheckpointError(
                f"config.json asks for what {self.options.layout} has no key for",
                faults=odd,
                hint="to convert the weights all the same, set each to null: `settings=KEY=null`",
            )

    def _warnings(self) -> Iterator[str]:
        """Yield the warnings of all checkpoints, each text once."""
        odd = (str(f) for model in self.average.models for f in model.faults if not f.fatal)
        yield from dict.fromkeys(odd)
        scales = sum(reason == CALIBRATED for reason in self.model.dropped.values())
        if scales and quantization_config.KEY in self.model.checkpoint.config:
            yield (
                f"{scales:,} calibrated scales of activations or of the KV cache are left out;"
                f" where `{quantization_config.KEY}` asks for them, runtimes will miss them"
            )

    def _config(self, transfers: list[Transfer]) -> dict[str, Any]:
        """Return config.json; empty for self-contained formats, which have none."""
        if self.format.is_self_contained:
            return {}
        return target_config(self.model, self.layout, self.options, transfers)

    def _request(self, transfers: list[Transfer]) -> PlacementRequest:
        """Return the transfers that the format has to place, and what it needs to know for that."""
        model = self.model
        return PlacementRequest(
            checkpoint=model.checkpoint,
            family=model.family,
            architecture=model.architecture,
            symbols=self.symbols,
            layout=self.layout,
            options=self.options,
            transfers=transfers,
            transfer_of=self._transfer,
            file_type=self.choice.file_type,
            average=self._in_words() if self.average.weighting else "",
        )

    def _in_words(self) -> str:
        """Return a text that names the weighting, and each checkpoint with its weight."""
        sources = (f"{s.weight:.9g} {s.uri} {s.revision}".strip() for s in self.average.sources())
        return f"{self.average.weighting}: {'; '.join(sources)}"

    def _side_files(self) -> dict[str, int]:
        """Return the small files to carry over, with sizes; none for a self-contained format."""
        if self.format.is_self_contained:
            return {}
        carried = {name: stat.size for name, stat in self.model.checkpoint.side_files.items()}
        if self.average.weighting:
            carried.pop(CARD_NAME, None)  # a new model card is written
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
                source = self.sources.terms(tensor)[-1].segments[0].source
                faults.append(Fault("dtype", str(exc), source.first_extent.file, tensor.name))
        if faults:
            raise CheckpointError("some tensors cannot be converted", faults=faults)
        return [*self._with_peers(transfers)]

    def _with_peers(self, transfers: list[Transfer]) -> Iterator[Transfer]:
        """Yield transfers with the peers of those whose matrix has a scale as a whole.

        Runtimes that make one matrix of several keep one such scale for all of it.
        """
        sets: dict[str, list[Transfer]] = {}
        for transfer in transfers:
            if transfer.target.encoding.needs_amax and not transfer.copies:
                sets.setdefault(self._fused(transfer), []).append(transfer)
        for transfer in transfers:
            peers = sets.get(self._fused(transfer), []) if self._fused(transfer) else []
            others = tuple(peer.terms for peer in peers if peer is not transfer)
            yield transfer._replace(peers=others) if transfer in peers else transfer

    def _fused(self, transfer: Transfer) -> str:
        return self.layout.tensors[PhysicalName(transfer.target.name)].fused

    def _transfer(self, tensor: PhysicalTensor) -> Transfer:
        terms = self._terms(tensor)
        is_average = len(terms) > 1 or len(terms[0].sources) > 1
        encoding, scaling, copies = self.choice.choose(tensor, terms, is_average=is_average)
        pitch, shape = (tensor.height, tensor.stored_shape) if tensor.transposition else (0, ())
        stored = StoredMatrix(
            tensor.name, tensor.shape, encoding, (), tensor.stack, (), pitch, shape
        )
        return Transfer(stored, terms, scaling, copies)

    def _terms(self, tensor: PhysicalTensor) -> tuple[Term, ...]:
        """Return the terms of a tensor: of all checkpoints, or of the base alone if excluded."""
        if tensor.name in self.exclude:
            return self.sources.base_terms(tensor)
        return self.sources.terms(tensor)

    def _check_coverage(self, transfers: list[Transfer]) -> tuple[Dropped, ...]:
        """Return the dropped tensors, after checking that all others are read."""
        check_targets(transfers)
        found: list[Dropped] = []
        for origin in self.sources:
            left_out = list(dropped(origin, self.layout))
            check_sources(origin, self.layout, transfers, left_out)
            found += left_out
        return (*found, *self._excluded(transfers))

    def _excluded(self, transfers: list[Transfer]) -> Iterator[Dropped]:
        """Yield the tensors that are read from the base alone, as dropped from the others."""
        others = len(self.average.models) - 1
        for transfer in transfers if others else ():
            if not transfer.is_average:
                nbytes = sum(segment.nbytes for segment in transfer.segments)
                reason = "taken from the last checkpoint: `--exclude`"
                yield Dropped(transfer.target.name, nbytes * others, reason)


def _target_layout(model: Model, options: ConvertOptions) -> tuple[Mapping[str, Any], Layout]:
    """Return the target's symbols and layout: the source's, except for what `--mtp` changes."""
    if options.mtp == Mtp.KEEP and options.layout_name == model.layout.name:
        return model.symbols, model.layout
    overrides = {
        Mtp.KEEP: {"layers": model.symbols["layers"]},
        Mtp.DROP: {"mtp_layers": 0, "layers": model.symbols["layers"]},
        Mtp.ONLY: {"layers": 0},
    }
    if options.mtp == Mtp.ONLY and not model.symbols["mtp_layers"]:
        raise UsageError("`mtp=only`: the source has no MTP layers")
    symbols = model.family.resolve(model.checkpoint.config, HF, overrides[Mtp(options.mtp)])
    return symbols, build_layout(model.family, symbols, options.layout_name)
