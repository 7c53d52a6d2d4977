"""Builds a Plan from a recognised model and the user's options, or refuses with every reason.

The ledger is kept here: each source tensor is consumed exactly once or dropped by a named policy,
each target tensor is filled completely. Pure: headers in, Plan out.
"""

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from lingconv.dtypes import DType, GgmlType
from lingconv.encodings import (
    Encoding,
    Fp8,
    Ggml,
    Plain,
    encoding_of,
    is_decodable,
    quantization_config,
)
from lingconv.encodings.ggml_mix import MIXES, Mix, ModelSize, Tensor, choose_types
from lingconv.encodings.plain import PLAIN
from lingconv.errors import CheckpointError, Fault, UsageError
from lingconv.family import PhysicalName, ScalePolicy
from lingconv.layout import HF, Layout, PhysicalTensor, build_layout
from lingconv.metadata.megatron import megatron_args, module_states
from lingconv.model import Model, refuse_faults
from lingconv.options import (
    AUTO,
    DEFAULT_SHARD_BYTES,
    DISTCP_BYTES,
    SCALE_F32,
    SCALE_UE8M0,
    ConvertOptions,
    Fp8Options,
    Mtp,
    Scheme,
    Target,
    TargetDType,
)
from lingconv.packing import pack_gguf, pack_safetensors, pack_torch_dist
from lingconv.patterns import Pattern
from lingconv.plan import Dropped, OutputFile, Plan, Scaling, Transfer
from lingconv.rules import megatron_notes
from lingconv.sidecars import ITERATION_FOLDER
from lingconv.spreading import spread
from lingconv.stored import Segment, Stored

PLAIN_SCALING = Scaling(0.0, power_of_two=False)
_PLAIN_DTYPES = {
    TargetDType.BF16: DType.BF16,
    TargetDType.F16: DType.F16,
    TargetDType.F32: DType.F32,
}
_CONFIG_DTYPES = {
    TargetDType.BF16: "bfloat16",
    TargetDType.F16: "float16",
    TargetDType.F32: "float32",
}


def build_plan(model: Model, options: ConvertOptions) -> Plan:
    """Return the plan that turns `model` into what `options` ask for.

    Raises UsageError when the request does not fit the model, and CheckpointError with the list of
    all faults when the checkpoint cannot be trusted.
    """
    options.check(model.family.scale_policies, model.family.merged)
    return _Planner(model, options).build()


class _Planner:
    def __init__(self, model: Model, options: ConvertOptions) -> None:
        self.model = model
        self.options = options
        self.ignore = [Pattern(text) for text in options.fp8.ignore]
        self.scale_rules = [(Pattern(text), policy) for text, policy in options.fp8.scale_rules]
        self.drop = [Pattern(text) for text in options.drop]
        self.symbols, self.layout = _target_layout(model, options)
        self.mix = _choose_mix(model, options) if options.layout == Target.GGUF else None
        self.types = self._choose_types()
        self.notes: list[str] = []
        self.args = self._args()
        self.fp8 = {power: _fp8(options.fp8, power_of_two=power) for power in (False, True)}

    def build(self) -> Plan:
        refuse_faults(self.model, self._excused)
        self._check_patterns()
        transfers = self._transfers()
        dropped = self._dropped()
        self._check_ledger(transfers, dropped)
        checkpoint = self.model.checkpoint
        return Plan(
            source=checkpoint.storage.uri,
            source_files={**checkpoint.shards, **checkpoint.side_files},
            family=self.model.family.name,
            options=self.options,
            args=self.args,
            states=self._states(),
            files=self._pack(transfers),
            side_files=self._side_files(),
            config={} if self.mix else self._config(transfers),
            dropped=dropped,
            total_parameters=sum(prod(transfer.target.shape) for transfer in transfers),
            warnings=(
                *(str(fault) for fault in self.model.faults if not fault.fatal),
                *self.notes,
            ),
        )

    def _pack(self, transfers: list[Transfer]) -> tuple[OutputFile, ...]:
        """Return the files of the target, in the container of its layout."""
        limit = self.options.max_shard_bytes
        if self.options.layout == Target.RANKS:
            args = self.args or {}
            return spread(self.model, self.symbols, self.options.megatron, args, self._transfer)
        if self.options.layout == Target.MEGATRON:
            return pack_torch_dist(transfers, limit or DISTCP_BYTES, ITERATION_FOLDER)
        if self.mix is None:
            return pack_safetensors(transfers, limit or DEFAULT_SHARD_BYTES)
        # With gguf-py, numpy and the tokenizer's library, which nothing else of planning needs.
        from lingconv.metadata.describe import Described, describe, file_stem

        request, model = self.options.gguf, self.model
        target = Described(self.layout, self.symbols, self.mix.file_type)
        metadata, notes = describe(
            model.checkpoint, model.family, model.architecture, target, request
        )
        self.notes += [*notes, *_lossy(transfers)]
        return pack_gguf(
            transfers,
            metadata,
            request.stem or file_stem(metadata, self.mix),
            max_shard_bytes=limit,
            max_tensors=request.max_shard_tensors,
        )

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
        if self.mix:
            return {}
        return {name: stat.size for name, stat in self.model.checkpoint.side_files.items()}

    def _choose_types(self) -> dict[str, GgmlType]:
        """Return the type of every tensor of a GGUF target."""
        if self.mix is None:
            return {}
        symbols = self.symbols
        size = ModelSize(
            symbols["all_layers"], symbols["experts"], symbols["heads"], symbols["kv_heads"]
        )
        tensors = [
            Tensor(name, tensor.stored_shape) for name, tensor in self.layout.tensors.items()
        ]
        return choose_types(tensors, self.mix, size, self.options.gguf.overrides())

    def _excused(self, fault: Fault) -> bool:
        """Return whether the user's options make a fault harmless."""
        if fault.kind == "extra tensor":
            return any(pattern.matches(fault.tensor) for pattern in self.drop)
        tensor = self.model.tensor(fault.tensor)
        dropped = self.options.mtp == Mtp.DROP and tensor is not None and tensor.mtp
        return dropped and fault.kind == "missing tensor"

    def _check_patterns(self) -> None:
        """Refuse patterns that match nothing: a typing error would go unnoticed."""
        quantizable = [t.name for t in self.layout.tensors.values() if t.role.quantizable]
        extra = [fault.tensor for fault in self.model.faults if fault.kind == "extra tensor"]
        checks: list[tuple[str, Pattern, Sequence[str]]] = [
            *(("ignore", pattern, [*self.layout.tensors]) for pattern in self.ignore),
            *(("scale", pattern, quantizable) for pattern, _ in self.scale_rules),
            *(("drop", pattern, extra) for pattern in self.drop),
        ]
        for regex, kind in self.options.gguf.overrides():
            if not any(regex.search(name) for name in self.layout.tensors):
                raise UsageError(
                    f"`--tensor-type {regex.pattern}={kind.lower()}` matches nothing",
                    hint="patterns are regular expressions, found anywhere in GGUF's names",
                )
        for option, pattern, names in checks:
            if not any(pattern.matches(name) for name in names):
                raise UsageError(
                    f"`--{option} {pattern.text}` matches nothing",
                    hint="patterns are exact names, globs, or `re:` and a regular expression",
                )

    def _transfers(self) -> list[Transfer]:
        locator = self.model.locator()
        transfers = []
        faults: list[Fault] = []
        for tensor in self.layout.tensors.values():
            segments = locator.segments(tensor.rows)
            try:
                transfers.append(self._transfer(tensor, segments))
            except ValueError as exc:
                file = segments[0].source.extents[0].file
                faults.append(Fault("dtype", str(exc), file, tensor.name))
        if faults:
            raise CheckpointError("some tensors cannot be converted", faults=faults)
        return transfers

    def _transfer(self, tensor: PhysicalTensor, segments: tuple[Segment, ...]) -> Transfer:
        found = segments[0].source.encoding
        target, scaling = self._encoding(tensor, found)
        copies = _is_copy(tensor, segments, target)
        if copies and isinstance(target, Fp8) and isinstance(found, Fp8):
            target = self.fp8[found.power_of_two] if self.options.dtype else found
        if not copies:
            self._check_decoding(tensor, segments, target)
        if tensor.turned and isinstance(target, Fp8):
            raise UsageError(
                f"{tensor.name} is stored transposed, and no runtime reads that in FP8",
                hint="add `--dtype bf16`, or stack experts otherwise (`--experts-as`)",
            )
        pitch, shape = (tensor.height, tensor.stored_shape) if tensor.turned else (0, ())
        stored = Stored(tensor.name, tensor.shape, target, (), tensor.stack, (), pitch, shape)
        return Transfer(stored, segments, scaling, copies)

    def _check_decoding(
        self, tensor: PhysicalTensor, segments: tuple[Segment, ...], target: Encoding
    ) -> None:
        found = {segment.source.encoding for segment in segments}
        if not self.options.dtype and not self.mix and not self.model.own_dtype:
            self._check_kept(tensor, found)
        for source in found:
            if not is_decodable(source):
                raise ValueError(f"{source.label} cannot be converted to {target.label}")
            fp8_again = isinstance(source, Fp8) and isinstance(target, Fp8)
            blocks_again = isinstance(source, Ggml) and isinstance(target, Fp8 | Ggml)
            if fp8_again or blocks_again:
                self._check_requantize(tensor, source, target)

    def _check_kept(self, tensor: PhysicalTensor, found: Collection[Encoding]) -> None:
        """Refuse what cannot be kept as it is found, because it does not go together."""
        if len(found) > 1:
            labels = " and ".join(sorted(encoding.label for encoding in found))
            raise UsageError(
                f"{tensor.name} is made of tensors in {labels}",
                hint="say what it is to be stored in: `--dtype bf16`",
            )
        if any(isinstance(encoding, Fp8) for encoding in found) and self.layout.base == HF:
            raise UsageError(
                f"{tensor.name} is made of FP8 blocks that do not end where one tensor follows"
                " another",
                hint="stack gate and up apart (`--experts-as dfactory`), or add `--dtype bf16`",
            )

    def _check_requantize(self, tensor: PhysicalTensor, source: Encoding, target: Encoding) -> None:
        if not self.options.allow_requantize:
            raise UsageError(
                f"{tensor.name} is {source.label} already; {target.label} would round it twice",
                hint="convert from the BF16 original, or pass `--allow-requantize`",
            )

    def _encoding(self, tensor: PhysicalTensor, found: Encoding) -> tuple[Encoding, Scaling]:
        """Return the target encoding of a tensor, and how its scales are chosen."""
        if self.mix:
            return encoding_of(self.types[tensor.name]), PLAIN_SCALING
        dtype = self.options.dtype
        if isinstance(found, Ggml) and not dtype:
            raise UsageError(
                f"{tensor.name} is {found.label}, which safetensors does not hold",
                hint="add `--dtype bf16` (or f32, f16, fp8)",
            )
        if isinstance(found, Fp8) and not dtype and self.options.is_megatron:
            return PLAIN[DType.BF16], PLAIN_SCALING
        if not dtype or (tensor.keep_dtype and isinstance(found, Plain)):
            own = None if tensor.keep_dtype else self.model.own_dtype
            return Plain(own) if own else found, PLAIN_SCALING
        if dtype != TargetDType.FP8:
            return Plain(_PLAIN_DTYPES[TargetDType(dtype)]), PLAIN_SCALING
        if not self._quantizes(tensor):
            # GGUF keeps norms and routers in F32, whatever they were.
            kept = isinstance(found, Plain) and self.model.layout.base == HF
            return found if kept else PLAIN[DType.BF16], PLAIN_SCALING
        scaling = self._scaling(tensor)
        return self.fp8[scaling.power_of_two], scaling

    def _quantizes(self, tensor: PhysicalTensor) -> bool:
        if not tensor.role.quantizable or len(tensor.shape) != 2:
            return False
        return not any(pattern.matches(tensor.name) for pattern in self.ignore)

    def _scaling(self, tensor: PhysicalTensor) -> Scaling:
        """Return the scale policy of a tensor: the last rule that names it, else the default."""
        policy = self.options.fp8.scale
        for pattern, named in self.scale_rules:
            if pattern.matches(tensor.name):
                policy = named
        if policy in (SCALE_F32, SCALE_UE8M0):
            return Scaling(0.0, power_of_two=policy == SCALE_UE8M0)
        return _apply_policy(self.model.family.scale_policies[policy], tensor)

    def _dropped(self) -> tuple[Dropped, ...]:
        """List the source tensors that no transfer reads, each with its policy."""
        stored = self.model.checkpoint.tensors
        kept = {rows.logical for tensor in self.layout.tensors.values() for rows in tensor.rows}
        reason = "left out by `--mtp`"
        by_mtp = [
            Dropped(name, stored[name].nbytes, reason)
            for tensor in self.model.layout.tensors.values()
            if tensor.name in self.model.stored and tensor.rows[0].logical not in kept
            for name in self.model.stored[tensor.name].encoding.names(tensor.name)
        ]
        by_family = [
            Dropped(name, stored[name].nbytes, why) for name, why in self.model.dropped.items()
        ]
        by_user = [
            Dropped(name, stored[name].nbytes, "left out by `--drop`")
            for name in (f.tensor for f in self.model.faults if f.kind == "extra tensor")
        ]
        ignored = [
            Dropped(name, stat.size, why)
            for name, (stat, why) in self.model.checkpoint.ignored.items()
        ]
        by_kind = [
            Dropped(f"{held.entries:,} entries", held.nbytes, f"{kind}, no part of the model")
            for kind, held in self.model.checkpoint.left_out.items()
        ]
        return (*by_mtp, *by_family, *by_user, *ignored, *by_kind)

    def _check_ledger(self, transfers: list[Transfer], dropped: Iterable[Dropped]) -> None:
        """Every source tensor is read in full once, or dropped; every target is filled."""
        used = {item.name: 1 for item in dropped}
        elements: dict[str, int] = {}
        for transfer in transfers:
            filled = sum(segment.num_rows * segment.num_cols for segment in transfer.segments)
            if filled != transfer.rows * transfer.cols:
                raise AssertionError(f"{transfer.target.name}: {filled} elements are not all")
            for segment in transfer.segments:
                name = segment.source.name
                found = segment.num_rows * segment.num_cols
                elements[name] = elements.get(name, 0) + found
        for source in self.model.stored.values():
            if elements.get(source.name) == source.rows * source.cols:
                for name in source.encoding.names(source.name):
                    used[name] = used.get(name, 0) + 1
        wrong = [name for name in self.model.checkpoint.tensors if used.get(name) != 1]
        if wrong:
            raise AssertionError(f"not read exactly once: {wrong[:10]}")

    def _config(self, transfers: list[Transfer]) -> dict[str, Any]:
        """Return config.json for the target; unknown keys stay, in their order."""
        config = dict(self.model.checkpoint.config)
        config.update(self._mtp_keys())
        dtype = self.options.dtype
        if dtype in _CONFIG_DTYPES:
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = _CONFIG_DTYPES[TargetDType(dtype)]
        fp8 = [t.target.encoding for t in transfers if isinstance(t.target.encoding, Fp8)]
        kept = [
            transfer.target.name.removesuffix(".weight")
            for transfer in transfers
            if isinstance(transfer.target.encoding, Plain)
            and self.layout.tensors[PhysicalName(transfer.target.name)].role.is_linear_module
        ]
        stated = config.get(quantization_config.KEY)
        if not fp8:
            config.pop(quantization_config.KEY, None)
        elif dtype or self.options.mtp == Mtp.ONLY:
            config[quantization_config.KEY] = quantization_config.build(fp8, kept)
        elif stated and self.model.layout.name != self.layout.name:
            config[quantization_config.KEY] = quantization_config.with_kept(
                stated,
                kept,
                (t.target.name for t in transfers if isinstance(t.target.encoding, Fp8)),
            )
        return config

    def _mtp_keys(self) -> dict[str, Any]:
        """Return the config keys that change with the number of MTP layers."""
        symbols, key = self.model.symbols, self.model.family.key
        if self.options.mtp == Mtp.KEEP or not symbols["mtp_layers"]:
            return {}
        if self.options.mtp == Mtp.DROP:
            return {key("mtp_layers", HF): 0, key("layers", HF): symbols["layers"]}
        # As Ling-V2's converter writes a stand-alone MTP model (`--mtp-path`).
        return {key("layers", HF): symbols["mtp_layers"], key("dense_layers", HF): 0}


def _fp8(options: Fp8Options, *, power_of_two: bool) -> Fp8:
    """Return the encoding that the options ask for."""
    channel = options.scheme == Scheme.CHANNEL
    block_rows, block_cols = (1, 0) if channel else quantization_config.DEFAULT_BLOCK
    return Fp8(
        block_rows,
        block_cols,
        quantization_config.suffix_of(options.resolved_dialect),
        options.resolved_scale_dtype,
        power_of_two=power_of_two,
    )


def _choose_mix(model: Model, options: ConvertOptions) -> Mix:
    """Return the mix that was asked for; `auto` is the 16-bit float that the weights are in."""
    if options.gguf.outtype != AUTO:
        return MIXES[options.gguf.outtype]
    f16 = PLAIN[DType.F16]
    matrices = [stored for stored in model.stored.values() if len(stored.shape) > 1]
    return Mix.F16 if matrices and matrices[0].encoding == f16 else Mix.BF16


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


def _is_copy(tensor: PhysicalTensor, segments: Iterable[Segment], target: Encoding) -> bool:
    """Return whether the bytes of all segments are right in the target as they are.

    Segments of FP8 have to be whole blocks, where they come from and where they go.
    """
    if not all(target.can_hold(segment.source.encoding) for segment in segments):
        return False
    if not isinstance(target, Fp8):
        return True
    row = 0
    for segment in segments:
        source = segment.source
        if not target.has_whole_blocks(segment.first_row, segment.num_rows, source.height):
            return False
        if not target.has_whole_blocks(row, segment.num_rows, tensor.height):
            return False
        if segment.num_rows > tensor.height != source.height:
            return False
        row += segment.num_rows
    return True


def _apply_policy(policy: ScalePolicy, tensor: PhysicalTensor) -> Scaling:
    ue8m0 = any(
        fnmatch.fnmatchcase(rows.logical, glob) for rows in tensor.rows for glob in policy.ue8m0
    )
    return Scaling(policy.min_amax, power_of_two=ue8m0)
