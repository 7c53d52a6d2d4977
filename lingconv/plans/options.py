"""The options of a conversion: one frozen value, checked once.

Everything here changes the output, and is therefore part of a run's identity. Threads, memory and
progress do not, and are options of the execution.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from lingconv.encodings import Encoding, Int4, Mxfp4, Nvfp4
from lingconv.encodings.dtypes import GGML_TYPES, DType, GgmlType
from lingconv.encodings.four_bits import MXFP4_GROUP, NVFP4_GROUP, Dialect
from lingconv.encodings.ggml_ftype import FILE_TYPES, FileType, is_written
from lingconv.encodings.quantization_config import COMPRESSED_TENSORS, FP8
from lingconv.encodings.scaling import Rule, Search
from lingconv.errors import UsageError
from lingconv.model.parallelism import Parallel

DEFAULT_SHARD_BYTES = 10_000_000_000
DISTCP_BYTES = 2_000_000_000
AUTO = "auto"
DEFAULT_MERGED = "dfactory"


class Target(StrEnum):
    """`--to`: the layout to write, and with it the checkpoint format."""

    HF = "hf"
    HF_MERGED = "hf-merged"
    GGUF = "gguf"
    MEGATRON = "megatron"
    RANKS = "megatron-ranks"


class ExpertNames(StrEnum):
    """How a legacy per-rank checkpoint names its experts."""

    GROUPED = "grouped"
    SEQUENTIAL = "sequential"
    FUSED = "fused"


class Spec(StrEnum):
    """`--spec`: the Megatron layer implementation that is to load the checkpoint."""

    TE = "te"
    LOCAL = "local"


class MtpModule(StrEnum):
    """`--mtp-module`: what a rank of Megatron calls the layer inside of an MTP layer.

    `transformer_layer` up to megatron-core 0.16, `mtp_model_layer` from 0.17 on.
    """

    TRANSFORMER_LAYER = "transformer_layer"
    MTP_MODEL_LAYER = "mtp_model_layer"


class TargetDType(StrEnum):
    """`--dtype`: the dtype in which weights are stored."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    FP8 = "fp8"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"
    INT4 = "int4"

    @property
    def has_four_bits(self) -> bool:
        """Whether it is an encoding of four bits."""
        return self in (TargetDType.NVFP4, TargetDType.MXFP4, TargetDType.INT4)


class Scheme(StrEnum):
    """`--scheme`: the weights that share a scale."""

    BLOCK = "block"
    CHANNEL = "channel"


class Mtp(StrEnum):
    """`--mtp`: whether multi-token-prediction layers are kept, dropped, or written alone."""

    KEEP = "keep"
    DROP = "drop"
    ONLY = "only"


SCALE_F32 = "f32"
SCALE_UE8M0 = "ue8m0"
SCALE_DTYPES = {"f32": DType.F32, "bf16": DType.BF16, "e8m0": DType.F8_E8M0}


@dataclass(frozen=True, slots=True)
class Fp8Options:
    """Options of FP8 quantization; an empty string means the scheme's default."""

    scheme: str = Scheme.BLOCK
    dialect: str = ""
    scale: str = SCALE_F32
    scale_rules: tuple[tuple[str, str], ...] = ()
    scale_dtype: str = ""
    ignore: tuple[str, ...] = ()

    @property
    def resolved_dialect(self) -> str:
        """The dialect: block scales default to `fp8`, channel scales to compressed-tensors."""
        return self.dialect or (FP8 if self.scheme == Scheme.BLOCK else COMPRESSED_TENSORS)

    @property
    def resolved_scale_dtype(self) -> DType:
        """The dtype of stored scales: by default the one that the dialect's own tool writes."""
        usual = "f32" if self.resolved_dialect == FP8 else "bf16"
        return SCALE_DTYPES[self.scale_dtype or usual]

    def check(self, policies: Iterable[str]) -> None:
        """Raise UsageError for values or combinations that no runtime can read."""
        known = (SCALE_F32, SCALE_UE8M0, *policies)
        for policy in (self.scale, *(policy for _, policy in self.scale_rules)):
            if policy not in known:
                raise UsageError(f"no scale policy `{policy}`", hint=f"one of {', '.join(known)}")
        _check_word("scheme", self.scheme, list(Scheme))
        _check_word("dialect", self.resolved_dialect, [FP8, COMPRESSED_TENSORS])
        _check_word("scale_dtype", self.scale_dtype or "f32", list(SCALE_DTYPES))
        if self.scheme == Scheme.CHANNEL and self.resolved_dialect == FP8:
            raise UsageError(
                "the `fp8` dialect has no per-channel scales",
                hint=f"leave `dialect` out, or pass `dialect={COMPRESSED_TENSORS}`",
            )
        if self.resolved_scale_dtype == DType.F8_E8M0:
            if self.resolved_dialect != FP8:
                raise UsageError("only the `fp8` dialect stores F8_E8M0 scales")
            if self.scale != SCALE_UE8M0 or any(p != SCALE_UE8M0 for _, p in self.scale_rules):
                raise UsageError(
                    "F8_E8M0 holds powers of two only", hint="add `scale=ue8m0` for all weights"
                )


@dataclass(frozen=True, slots=True)
class FourBitOptions:
    """Options of NVFP4, MXFP4 and INT4; an empty string or 0 means the encoding's default.

    `include` are patterns of the weights to quantize, by default those of the routed experts, less
    those of `ignore`; `rest` is the dtype of the other linear weights. `inputs`: a scale of the
    activations is stored with every NVFP4 matrix (W4A4), 1.0, which is assumed and not measured.
    """

    dialect: str = ""
    group: int = 0
    search: str = Search.NONE
    rule: str = Rule.QUOTIENT
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    rest: str = TargetDType.BF16
    inputs: bool = False

    def encoding(self, dtype: str) -> Encoding:
        """Return the encoding that is asked for; raises UsageError where there is none."""
        dialect = Dialect(self.dialect or Dialect.COMPRESSED_TENSORS)
        if dtype == TargetDType.NVFP4:
            return Nvfp4(dialect, has_inputs=self.inputs)
        return Mxfp4(dialect) if dtype == TargetDType.MXFP4 else Int4(self.group or MXFP4_GROUP)

    def check(self, dtype: str) -> None:
        """Raise UsageError for values that `dtype` does not have."""
        if dtype not in _FOUR_BITS:
            if self != FourBitOptions():
                raise UsageError(
                    "`group`, `search`, `rule`, `include`, `rest` and `inputs` are for four bits",
                    hint="add `dtype=nvfp4`, `dtype=mxfp4` or `dtype=int4`",
                )
            return
        dialects, searches, groups = _FOUR_BITS[dtype]
        _check_word("dialect", self.dialect or dialects[0], dialects)
        _check_word("search", self.search, searches)
        _check_word("rule", self.rule, list(Rule) if dtype == TargetDType.INT4 else [Rule.QUOTIENT])
        _check_word("group", str(self.group or groups[0]), map(str, groups))
        _check_word("rest", self.rest, [TargetDType.BF16, TargetDType.FP8])
        if self.inputs and dtype != TargetDType.NVFP4:
            raise UsageError("`inputs` is for `dtype=nvfp4`: others scale activations as they come")
        if self.rest == TargetDType.FP8 and self.dialect == Dialect.MODELOPT:
            raise UsageError(
                "`rest=fp8` is not written in the dialect of ModelOpt",
                hint=f"leave `dialect` out, or pass `dialect={Dialect.COMPRESSED_TENSORS}`",
            )


# For each dtype: the dialects, searches and group sizes that there are, the default first.
_FOUR_BITS: dict[str, tuple[list[Dialect], list[Search], list[int]]] = {
    TargetDType.NVFP4: (
        [Dialect.COMPRESSED_TENSORS, Dialect.MODELOPT],
        [Search.NONE, Search.FOUR_OVER_SIX, Search.SWEEP],
        [NVFP4_GROUP],
    ),
    TargetDType.MXFP4: (
        [Dialect.COMPRESSED_TENSORS, Dialect.LING],
        [Search.NONE, Search.MSE],
        [MXFP4_GROUP],
    ),
    TargetDType.INT4: ([Dialect.COMPRESSED_TENSORS], [Search.NONE, Search.MSE], [32, 64, 128]),
}


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """Options of GGUF files; an empty string or 0 means the value that the model suggests.

    `tensor_types` are pairs (regular expression, ggml type), of which the first match in a name
    counts; `metadata` are further keys and texts; `stem` is the files' name without suffix.
    """

    outtype: str = AUTO
    tensor_types: tuple[tuple[str, str], ...] = ()
    tokenizer_pre: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    max_shard_tensors: int = 0
    stem: str = ""

    def overrides(self) -> list[tuple[re.Pattern[str], GgmlType]]:
        """Return `tensor_types` with compiled patterns, matched as llama-quantize matches them."""
        found = []
        known = [kind.lower() for kind in GgmlType if is_written(kind)]
        for pattern, word in self.tensor_types:
            _check_word("tensor_types", word.lower(), known)
            try:
                found.append((re.compile(pattern.lower()), GGML_TYPES[word.upper()]))
            except re.error as exc:
                raise UsageError(
                    f"`tensor_types={pattern}={word}` is no regular expression: {exc}"
                ) from exc
        return found

    def check(self) -> None:
        """Raise UsageError for what cannot be carried out."""
        _check_word("outtype", self.outtype, [AUTO, *FileType])
        overrides = self.overrides()
        if overrides and (
            self.outtype == AUTO or not FILE_TYPES[self.outtype].default.is_quantized
        ):
            raise UsageError(
                f"`tensor_types` changes a quantized mix, `outtype` is {self.outtype}",
                hint="choose one, for example `outtype=q8_0`",
            )
        if self.max_shard_tensors < 0:
            raise UsageError("`max_shard_tensors` must be positive")
        for key, _ in self.metadata:
            if not key.startswith("general."):
                raise UsageError(
                    f"`metadata={key}=...`: only texts under `general.` are the user's to set",
                    hint="for example `metadata=general.quantized_by=NAME`",
                )


@dataclass(frozen=True, slots=True)
class MegatronOptions:
    """Options of Megatron's formats: the names of its layers, and how experts are stored."""

    spec: str = Spec.TE
    singleton_experts: bool = False
    experts: str = ExpertNames.GROUPED
    parallel: Parallel = field(default_factory=Parallel)
    mtp_module: str = MtpModule.TRANSFORMER_LAYER

    @property
    def rank_layout(self) -> str:
        """The layout of legacy per-rank checkpoints, which name the modules of one rank."""
        modules = ["modules"] if self.spec == Spec.LOCAL else []
        newer = self.mtp_module == MtpModule.MTP_MODEL_LAYER
        mtp = [MtpModule.MTP_MODEL_LAYER] if newer else []
        return "+".join([Target.MEGATRON, self.experts, *modules, *mtp])

    @property
    def layout(self) -> str:
        """The layout of torch_dist with its refinements, as the family file names them."""
        local = ["local"] if self.spec == Spec.LOCAL else []
        singleton = ["singleton"] if self.singleton_experts else []
        return "+".join([Target.MEGATRON, *local, *singleton])

    def check(self) -> None:
        """Raise UsageError for unknown values or contradictory combinations."""
        _check_word("spec", self.spec, list(Spec))
        _check_word("experts", self.experts, list(ExpertNames))
        _check_word("mtp_module", self.mtp_module, list(MtpModule))
        for name, value in zip(Parallel._fields[:5], self.parallel[:5], strict=True):
            if value < 1:
                raise UsageError(f"`parallel.{name}` must be at least 1")
        if self.parallel.layers and self.parallel.vpp > 1:
            raise UsageError("`parallel.layers` and `parallel.vpp` cannot be combined")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """All options of a conversion. An empty `dtype` keeps the encoding of every tensor.

    `merged` is the family file's name for the layout of stacked experts that `hf-merged` writes;
    `exclude` are tensors that an average takes from its last checkpoint.
    `max_shard_bytes` None is the layout's default: 10 GB for safetensors, one file for GGUF.
    """

    layout: str = Target.HF
    dtype: str = ""
    fp8: Fp8Options = field(default_factory=Fp8Options)
    four_bits: FourBitOptions = field(default_factory=FourBitOptions)
    gguf: GgufOptions = field(default_factory=GgufOptions)
    megatron: MegatronOptions = field(default_factory=MegatronOptions)
    merged: str = DEFAULT_MERGED
    mtp: str = Mtp.KEEP
    max_shard_bytes: int | None = None
    drop: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_nonfinite: bool = False
    allow_requantize: bool = False

    def check(self, policies: Iterable[str], merged: Iterable[str]) -> None:
        """Raise UsageError for options that contradict each other or that the family cannot do.

        `policies` and `merged` are the family's quantization policies and layouts of stacked
        experts, by name.
        """
        if self.layout == Target.HF_MERGED:
            _check_word("merged", self.merged, merged)
        elif self.merged != DEFAULT_MERGED:
            raise UsageError(
                "`merged` is for stacked experts", hint=f"add `layout={Target.HF_MERGED}`"
            )
        _check_word("mtp", self.mtp, list(Mtp))
        if self.dtype:
            _check_word("dtype", self.dtype, list(TargetDType))
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise UsageError("`max_shard_bytes` must be positive")
        self.fp8.check(policies)
        self.four_bits.check(self.dtype)
        self.gguf.check()
        self.megatron.check()
        has_fp8 = TargetDType.FP8 in (self.dtype, self.four_bits.rest)
        if not has_fp8 and self.fp8 != Fp8Options():
            raise UsageError(
                "`scheme`, `dialect`, `scale`, `scale_dtype` and `ignore` are for FP8",
                hint="add `dtype=fp8`",
            )

    def refuse_unused(self, field_name: str) -> None:
        """Raise UsageError if there are options of a format that is not the target's.

        `field_name` is the field that holds them.
        """
        given = getattr(self, field_name)
        if given != type(given)():
            named, title, hint = _OPTIONS_OF[field_name]
            raise UsageError(f"{named} are for {title}", hint=hint)

    @property
    def layout_name(self) -> str:
        """The family file's name of the target's layout, refinements included."""
        if self.layout == Target.RANKS:
            return Target.MEGATRON
        if self.layout == Target.HF_MERGED:
            return f"{Target.HF}+{self.merged}"
        return self.megatron.layout if self.layout == Target.MEGATRON else self.layout

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values.

        Those of four bits and the MTP module are left out where nothing asks for them, so that the
        digests of other plans stay what they were before there were such options.
        """
        value = asdict(self)
        if self.four_bits == FourBitOptions():
            del value["four_bits"]
        if self.megatron.mtp_module == MtpModule.TRANSFORMER_LAYER:
            del value["megatron"]["mtp_module"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ConvertOptions":
        """Build from what `to_json` returned (lists are tuples again)."""
        fields = dict(value)
        fp8 = dict(fields.pop("fp8"))
        fp8["scale_rules"] = tuple((pattern, policy) for pattern, policy in fp8["scale_rules"])
        fp8["ignore"] = tuple(fp8["ignore"])
        four_bits = dict(fields.pop("four_bits", {}))
        for name in ("include", "ignore"):
            four_bits[name] = tuple(four_bits.get(name, ()))
        gguf, megatron = dict(fields.pop("gguf")), dict(fields.pop("megatron"))
        tp, pp, ep, etp, vpp, layers = megatron["parallel"]
        parallel = Parallel(tp, pp, ep, etp, vpp, tuple(layers))
        for name in ("tensor_types", "metadata"):
            gguf[name] = tuple((left, right) for left, right in gguf[name])
        return cls(
            **{**fields, "drop": tuple(fields["drop"]), "exclude": tuple(fields["exclude"])},
            fp8=Fp8Options(**fp8),
            four_bits=FourBitOptions(**four_bits),
            gguf=GgufOptions(**gguf),
            megatron=MegatronOptions(**{**megatron, "parallel": parallel}),
        )


# For each field of format options: its own fields, the format's name, how to ask for it.
_OPTIONS_OF = {
    "gguf": (
        "`outtype`, `tensor_types`, `tokenizer_pre`, `metadata` and `max_shard_tensors`",
        "GGUF",
        "add `layout=gguf`, or let DST end with `.gguf`",
    ),
    "megatron": (
        "`spec`, `singleton_experts`, `experts=sequential`, `mtp_module` and the numbers of ranks",
        "Megatron",
        "add `layout=megatron` or `layout=megatron-ranks`",
    ),
}


def _check_word(option: str, word: str, known: Iterable[str]) -> None:
    words = [str(each) for each in known]
    if word not in words:
        raise UsageError(f"`{option}` is `{word}`", hint=f"one of {', '.join(words)}")
