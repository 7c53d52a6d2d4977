"""The encoding of each target tensor, whether its bytes are copied, and what is refused."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.containers.registry import format_for
from lingconv.encodings import Encoding, Fp8, Plain, encoding_of, quantization_config
from lingconv.encodings.dtypes import DType, GgmlType
from lingconv.encodings.four_bits import Dialect
from lingconv.encodings.ggml_ftype import (
    FILE_TYPE_KEY,
    FILE_TYPES,
    FileType,
    GgufTensor,
    ModelSize,
    choose_types,
)
from lingconv.encodings.name_pattern import Pattern, among
from lingconv.encodings.plain import PLAIN
from lingconv.encodings.quantization_config import COMPRESSED_TENSORS, FP8
from lingconv.encodings.scaling import Rule, Scaling, Search
from lingconv.errors import UsageError
from lingconv.model.family import Role, ScalePolicy
from lingconv.model.layout import HF, Layout, PhysicalTensor
from lingconv.plans.options import (
    AUTO,
    SCALE_F32,
    SCALE_UE8M0,
    ConvertOptions,
    FourBitOptions,
    Fp8Options,
    Scheme,
    Target,
    TargetDType,
)
from lingconv.plans.plan import Term
from lingconv.plans.tensor_map import MatrixSlice

_PLAIN_SCALING = Scaling(0.0, power_of_two=False)
_PLAIN_DTYPES = {
    TargetDType.BF16: DType.BF16,
    TargetDType.F16: DType.F16,
    TargetDType.F32: DType.F32,
}


class EncodingChoice:
    """Chooses encodings by the user's options and by those in the base checkpoint."""

    def __init__(
        self,
        model: Model,
        layout: Layout,
        symbols: Mapping[str, Any],
        options: ConvertOptions,
    ) -> None:
        self._format = format_for(options.layout)
        self.file_type = _file_type(model, options) if options.layout == Target.GGUF else None
        # Of a GGUF file, nothing is quantized anew unless it is asked for.
        self._keeps_types = (
            self.file_type is not None
            and options.gguf.outtype == AUTO
            and model.checkpoint.metadata is not None
        )
        self._model = model
        self._layout = layout
        self._options = options
        self._ignore = [Pattern(text) for text in (*options.fp8.ignore, *options.four_bits.ignore)]
        self._ignored = among(self._ignore, layout.tensors)
        self._include = [Pattern(text) for text in options.four_bits.include]
        self._included = among(self._include, layout.tensors)
        asked = bool(options.dtype) and TargetDType(options.dtype).has_four_bits
        self._four_bits = options.four_bits.encoding(options.dtype) if asked else None
        self._scale_rules = [(Pattern(text), policy) for text, policy in options.fp8.scale_rules]
        self._scaled = [(rule.among(layout.tensors), policy) for rule, policy in self._scale_rules]
        fp8 = _beside(options.four_bits, options.fp8) if self._four_bits else options.fp8
        self._fp8_scale = fp8.scale
        self._fp8 = {power: _fp8(fp8, power_of_two=power) for power in (False, True)}
        self._types = (
            _choose_types(layout, symbols, options, self.file_type) if self.file_type else {}
        )

    def choose(
        self, tensor: PhysicalTensor, terms: tuple[Term, ...], *, is_average: bool
    ) -> tuple[Encoding, Scaling, bool]:
        """Return a tensor's encoding, its scale policy, and whether bytes are copied.

        Raises UsageError if the user has to decide something, and ValueError if the tensor cannot
        be converted at all.
        """
        segments = terms[-1].segments
        found = segments[0].source.encoding
        if self._keeps_types and not is_average:
            target, scaling = found, _PLAIN_SCALING
        else:
            target, scaling = self._encoding(tensor, found)
        copies = not is_average and _is_copy(tensor, segments, target)
        if copies and target.has_scales:
            target = self._copied(target, found)
        if is_average and not self._options.dtype and target.has_scales:
            raise UsageError(
                f"{tensor.name} is {target.label} in the last checkpoint",
                hint="say what the average is to be stored in: `dtype=bf16` (or fp8)",
            )
        if not copies:
            self._check_decoding(tensor, terms, target, is_average=is_average)
        if tensor.stack and not target.holds_stacks:
            raise UsageError(
                f"{tensor.name} is a stack of experts, which no runtime reads in {target.label}",
                hint="write experts one by one (`layout=hf`), or add `dtype=bf16`",
            )
        if tensor.transposition and target.has_scales:
            raise UsageError(
                f"{tensor.name} is stored transposed, and no runtime reads that in {target.label}",
                hint="add `dtype=bf16`, or stack experts otherwise (`merged`)",
            )
        return target, scaling, copies

    def _copied(self, target: Encoding, found: Encoding) -> Encoding:
        """Return the encoding of a copy: the target's dialect, and what the source's scales are."""
        if not self._options.dtype:
            return found
        return self._fp8[found.has_power_of_two_scales] if target in self._fp8.values() else target

    def check_patterns(self, extra: Collection[str]) -> None:
        """Raise UsageError for a pattern that matches nothing, which is most often a typo.

        `extra` are the stored tensors that the layout does not have.
        """
        names = [*self._layout.tensors]
        quantizable = [t.name for t in self._layout.tensors.values() if t.role.quantizable]
        for regex, kind in self._options.gguf.overrides():
            if not any(regex.search(name) for name in names):
                raise UsageError(
                    f"`tensor_types={regex.pattern}={kind.lower()}` matches nothing",
                    hint="patterns are regular expressions, found anywhere in GGUF's names",
                )
        refuse_idle("ignore", self._ignore, names)
        refuse_idle("include", self._include, quantizable)
        refuse_idle("scale", [pattern for pattern, _ in self._scale_rules], quantizable)
        refuse_idle("drop", [Pattern(text) for text in self._options.drop], extra)
        refuse_idle("exclude", [Pattern(text) for text in self._options.exclude], names)

    def _check_decoding(
        self, tensor: PhysicalTensor, terms: Iterable[Term], target: Encoding, *, is_average: bool
    ) -> None:
        found = {segment.source.encoding for term in terms for segment in term.segments}
        keeps = not self._options.dtype and not self.file_type and not self._model.own_dtype
        if keeps and not is_average:
            self._check_kept(tensor, found)
        for source in found:
            if not source.is_decodable:
                raise ValueError(f"{source.label} cannot be converted to {target.label}")
            # Models that were trained in FP8 are converted to GGUF this way: a note, no error.
            again = source.is_quantized and target.is_quantized
            usual = source.has_scales and (
                not target.has_scales or source.element_bits >= 2 * target.element_bits
            )
            if again and not usual and not self._options.allow_requantize:
                raise UsageError(
                    f"{tensor.name} is {source.label} already; {target.label} would round it twice",
                    hint="convert from the BF16 original, or pass `allow_requantize`",
                )

    def _check_kept(self, tensor: PhysicalTensor, found: Collection[Encoding]) -> None:
        """Raise UsageError if a tensor's parts have encodings that cannot be kept together."""
        if len(found) > 1:
            labels = " and ".join(sorted(encoding.label for encoding in found))
            raise UsageError(
                f"{tensor.name} is made of tensors in {labels}",
                hint="say what it is to be stored in: `dtype=bf16`",
            )
        if any(encoding.has_scales for encoding in found) and self._layout.base == HF:
            labels = " and ".join(sorted(encoding.label for encoding in found))
            raise UsageError(
                f"{tensor.name} is made of {labels} blocks that do not end where one tensor follows"
                " another",
                hint="stack gate and up apart (`merged=dfactory`), or add `dtype=bf16`",
            )

    def _encoding(self, tensor: PhysicalTensor, found: Encoding) -> tuple[Encoding, Scaling]:
        """Return the target encoding of a tensor, and its scale policy."""
        if self.file_type:
            return encoding_of(self._types[tensor.name]), _PLAIN_SCALING
        dtype = self._options.dtype
        if not dtype and not self._format.holds(found):
            if found.intended_dtype is None:
                raise UsageError(
                    f"{tensor.name} is {found.label}, which {self._format.name} does not hold",
                    hint="add `dtype=bf16` (or f32, f16, fp8)",
                )
            return PLAIN[found.intended_dtype], _PLAIN_SCALING
        if not dtype or (tensor.keep_dtype and not found.is_quantized):
            own = None if tensor.keep_dtype else self._model.own_dtype
            return Plain(own) if own else found, _PLAIN_SCALING
        if dtype in _PLAIN_DTYPES:
            return Plain(_PLAIN_DTYPES[TargetDType(dtype)]), _PLAIN_SCALING
        if self._four_bits and self._takes_four_bits(tensor):
            policy = self._options.four_bits
            scaling = Scaling(0.0, False, Search(policy.search), Rule(policy.rule))
            return self._in_four_bits(tensor, self._four_bits), scaling
        keeps = self._four_bits and self._options.four_bits.rest != TargetDType.FP8
        if keeps or not self._quantizes(tensor):
            # GGUF stores norms and routers in F32, whatever the source has.
            kept = not found.is_quantized and self._model.layout.base == HF
            return found if kept else PLAIN[DType.BF16], _PLAIN_SCALING
        scaling = self._scaling(tensor)
        return self._fp8[scaling.power_of_two], scaling

    def _takes_four_bits(self, tensor: PhysicalTensor) -> bool:
        """Return whether a weight is stored in four bits: by default, those of routed experts."""
        if tensor.name in self._ignored or not tensor.role.quantizable:
            return False
        return tensor.name in self._included if self._include else tensor.role == Role.EXPERT

    def _in_four_bits(self, tensor: PhysicalTensor, encoding: Encoding) -> Encoding:
        """Return `encoding`, or raise an error where it cannot store a weight."""
        if tensor.shape[-1] % encoding.col_multiple:
            raise UsageError(
                f"{tensor.name} has {tensor.shape[-1]:,} columns, which groups of"
                f" {encoding.col_multiple} do not divide",
                hint=f"leave it as it is: `ignore={tensor.name}`, or choose another `group`",
            )
        return encoding

    def _quantizes(self, tensor: PhysicalTensor) -> bool:
        if not tensor.role.quantizable or len(tensor.shape) != 2:
            return False
        return tensor.name not in self._ignored

    def _scaling(self, tensor: PhysicalTensor) -> Scaling:
        """Return the scale policy of a tensor: the last rule that names it, else the default."""
        policy = self._fp8_scale
        for names, named in self._scaled:
            if tensor.name in names:
                policy = named
        if policy in (SCALE_F32, SCALE_UE8M0):
            return Scaling(0.0, power_of_two=policy == SCALE_UE8M0)
        return _apply_policy(self._model.family.scale_policies[policy], tensor)


def refuse_idle(option: str, patterns: Iterable[Pattern], names: Collection[str]) -> None:
    """Raise UsageError for a pattern that matches none of `names`."""
    for pattern in patterns:
        if not pattern.among(names):
            raise UsageError(
                f"`{option}={pattern.text}` matches nothing",
                hint="patterns are exact names, globs, or `re:` and a regular expression",
            )


def _beside(four_bits: FourBitOptions, fp8: Fp8Options) -> Fp8Options:
    """Return the options of FP8 in a checkpoint of four bits, whose dialect it shares."""
    if four_bits.dialect == Dialect.LING:  # its config has one `scale_fmt` for all scales
        return replace(fp8, dialect=FP8, scale=SCALE_UE8M0)
    return replace(fp8, dialect=fp8.dialect or COMPRESSED_TENSORS)


def _fp8(options: Fp8Options, *, power_of_two: bool) -> Fp8:
    """Return the FP8 encoding that the options ask for."""
    channel = options.scheme == Scheme.CHANNEL
    block_rows, block_cols = (1, 0) if channel else quantization_config.DEFAULT_BLOCK
    return Fp8(
        block_rows,
        block_cols,
        quantization_config.suffix_of(options.resolved_dialect),
        options.resolved_scale_dtype,
        power_of_two=power_of_two,
    )


def _file_type(model: Model, options: ConvertOptions) -> FileType:
    """Return the requested file type (ftype).

    `auto` is that of a GGUF source, else F16 if the first matrix is, else BF16.
    """
    if options.gguf.outtype != AUTO:
        return FILE_TYPES[options.gguf.outtype]
    held = (model.checkpoint.metadata or {}).get(FILE_TYPE_KEY)
    known = next((each for each in FileType if held and each.file_type == held.data), None)
    if known is not None:
        return known
    f16 = PLAIN[DType.F16]
    matrices = [stored for stored in model.stored.values() if len(stored.shape) > 1]
    return FileType.F16 if matrices and matrices[0].encoding == f16 else FileType.BF16


def _choose_types(
    layout: Layout, symbols: Mapping[str, Any], options: ConvertOptions, file_type: FileType
) -> dict[str, GgmlType]:
    """Return the ggml type of every tensor of a GGUF target, by name."""
    size = ModelSize(
        symbols["all_layers"], symbols["experts"], symbols["heads"], symbols["kv_heads"]
    )
    tensors = [GgufTensor(name, tensor.stored_shape) for name, tensor in layout.tensors.items()]
    return choose_types(tensors, file_type, size, options.gguf.overrides())


def _is_copy(tensor: PhysicalTensor, segments: Iterable[MatrixSlice], target: Encoding) -> bool:
    """Return whether the bytes of all segments can be copied to the target unchanged.

    FP8 segments have to be whole blocks, both in the source and in the target.
    """
    if not all(target.can_hold(segment.source.encoding) for segment in segments):
        return False
    if not target.has_scales:
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
