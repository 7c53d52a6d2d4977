"""The type of each tensor of a GGUF file: the mixes (ftypes) of llama-quantize, rule by rule.

A mix is a default type and exceptions by a tensor's role, its layer, and the number of experts.
Names are GGUF's own. Rules: src/llama-quant.cpp and llama_ftype in
include/llama.h of github.com/ggml-org/llama.cpp at 0c1e5709, without an importance matrix.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

from lingconv.encodings.dtypes import GgmlType
from lingconv.encodings.dtypes import GgmlType as T

# The key of GGUF that has the number of a file type.
FILE_TYPE_KEY = "general.file_type"


class FileType(StrEnum):
    """`--outtype`: `file_type` is general.file_type (llama_ftype), `default` most tensors' type."""

    file_type: int
    default: GgmlType

    F32 = "f32", 0, T.F32
    F16 = "f16", 1, T.F16
    Q4_0 = "q4_0", 2, T.Q4_0
    Q4_1 = "q4_1", 3, T.Q4_1
    Q8_0 = "q8_0", 7, T.Q8_0
    Q5_0 = "q5_0", 8, T.Q5_0
    Q5_1 = "q5_1", 9, T.Q5_1
    Q2_K = "q2_k", 10, T.Q2_K
    Q3_K_S = "q3_k_s", 11, T.Q3_K
    Q3_K_M = "q3_k_m", 12, T.Q3_K
    Q3_K_L = "q3_k_l", 13, T.Q3_K
    Q4_K_S = "q4_k_s", 14, T.Q4_K
    Q4_K_M = "q4_k_m", 15, T.Q4_K
    Q5_K_S = "q5_k_s", 16, T.Q5_K
    Q5_K_M = "q5_k_m", 17, T.Q5_K
    Q6_K = "q6_k", 18, T.Q6_K
    IQ4_NL = "iq4_nl", 25, T.IQ4_NL
    IQ4_XS = "iq4_xs", 30, T.IQ4_XS
    BF16 = "bf16", 32, T.BF16
    TQ1_0 = "tq1_0", 36, T.TQ1_0
    TQ2_0 = "tq2_0", 37, T.TQ2_0
    MXFP4_MOE = "mxfp4_moe", 38, T.MXFP4

    def __new__(cls, name: str, file_type: int, default: GgmlType) -> Self:
        """Return the member with number and default type as plain attributes."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.file_type = file_type
        member.default = default
        return member


FILE_TYPES: dict[str, FileType] = {mix.value: mix for mix in FileType}
# Types that llama-quantize writes without an importance matrix.
_WRITTEN = frozenset({T.F32, T.F16, T.BF16, *(mix.default for mix in FileType)})


def is_written(kind: GgmlType) -> bool:
    """Return whether tensors can be written in this type."""
    return kind in _WRITTEN


class TensorRole(StrEnum):
    """The roles of tensors that the mixes distinguish, each with its part of GGUF's names."""

    OUTPUT = "output.weight"
    TOKEN_EMBD = "token_embd.weight"
    ATTN_QKV = "attn_qkv.weight"
    ATTN_V = "attn_v.weight"
    ATTN_K = "attn_k.weight"
    ATTN_OUTPUT = "attn_output.weight"
    FFN_DOWN = "ffn_down"
    OTHER = ""


class GgufTensor(NamedTuple):
    """A tensor for which a type is chosen; `shape` is in numpy's order, experts have three axes."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of the model on which the mixes depend; `blocks` includes MTP layers."""

    blocks: int
    experts: int
    heads: int
    kv_heads: int


# Mixes with more bits for attention's value matrices (and a fused QKV) in all layers.
_ATTN_V = {FileType.Q3_K_L: T.Q5_K}
# The same for models in which at least four query heads share a value head.
_ATTN_V_SHARED = {FileType.Q2_K: T.Q4_K, FileType.IQ4_NL: T.Q5_K, FileType.IQ4_XS: T.Q5_K}
_FFN_DOWN = {FileType.Q2_K: T.Q3_K, FileType.Q3_K_L: T.Q5_K}
_ATTN_OUTPUT = {FileType.Q2_K: T.Q3_K, FileType.Q3_K_M: T.Q4_K, FileType.Q3_K_L: T.Q5_K}
# The same for models of exactly eight experts, which llama-quantize takes for Mixtral.
_ATTN_OUTPUT_OF_8 = dict.fromkeys(
    (
        FileType.Q2_K,
        FileType.Q3_K_S,
        FileType.Q3_K_M,
        FileType.IQ4_NL,
        FileType.Q4_K_S,
        FileType.Q4_K_M,
        FileType.IQ4_XS,
    ),
    T.Q5_K,
)
_TOKEN_EMBD = {FileType.TQ1_0: T.Q4_K, FileType.TQ2_0: T.Q4_K, FileType.MXFP4_MOE: T.Q8_0}
# Fallback types for rows whose length is not a multiple of the block size.
_FALLBACK = {
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    T.IQ4_XS: T.IQ4_NL,
}
_MIXTRAL_EXPERTS = 8


def choose_types(
    tensors: Sequence[GgufTensor],
    mix: FileType,
    size: ModelSize,
    overrides: Iterable[tuple[re.Pattern[str], GgmlType]] = (),
) -> dict[str, GgmlType]:
    """Return the type of every tensor, as llama-quantize chooses it for a BF16 file.

    The first of `overrides` whose pattern matches in a name decides, if the mix quantizes at all.
    """
    chooser = _TypeChoice(mix, size, tuple(overrides), {tensor.name for tensor in tensors})
    ordered = sorted(tensors, key=lambda tensor: _rank(tensor.name))
    chosen = {tensor.name: chooser.choose(tensor) for tensor in ordered}
    return {tensor.name: chosen[tensor.name] for tensor in tensors}


def _rank(name: str) -> tuple[int, str]:
    """Return the sort key of llama-quantize's order: tensors outside of blocks first."""
    block = _block_of(name)
    return (-1 if block is None else block, name)


def _block_of(name: str) -> int | None:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else None


def _kind_of(name: str) -> TensorRole:
    if name in (TensorRole.OUTPUT, TensorRole.TOKEN_EMBD):
        return TensorRole(name)
    inside = [kind for kind in TensorRole if kind not in (TensorRole.OUTPUT, TensorRole.TOKEN_EMBD)]
    return next(kind for kind in inside if kind in name)


def stays_plain(tensor: GgufTensor) -> bool:
    """Return whether a tensor is kept in F32 by all mixes: vectors, norms and routers."""
    name = tensor.name
    kept = len(tensor.shape) < 2 or not name.endswith("weight")
    return kept or "_norm.weight" in name or "ffn_gate_inp.weight" in name


class _TypeChoice:
    """Chooses types and counts the tensors of each role: some rules depend on these counts."""

    def __init__(
        self,
        mix: FileType,
        size: ModelSize,
        overrides: tuple[tuple[re.Pattern[str], GgmlType], ...],
        names: set[str],
    ) -> None:
        self.mix = mix
        self.size = size
        self.overrides = overrides
        self.tied = TensorRole.OUTPUT not in names
        self.num_values = sum(
            _kind_of(name) in (TensorRole.ATTN_V, TensorRole.ATTN_QKV) for name in names
        )
        self.values_met = 0
        self.downs_met = 0

    def choose(self, tensor: GgufTensor) -> GgmlType:
        """Return the type of the next tensor."""
        if stays_plain(tensor):
            return T.F32
        if not self.mix.default.is_quantized:
            return self.mix.default
        found = next((to for pattern, to in self.overrides if pattern.search(tensor.name)), None)
        return _fitting(self._by_rules(tensor) if found is None else found, tensor.shape[-1])

    def _by_rules(self, tensor: GgufTensor) -> GgmlType:
        kind = _kind_of(tensor.name)
        if kind == TensorRole.OUTPUT or (kind == TensorRole.TOKEN_EMBD and self.tied):
            return self._output(tensor.shape[-1])
        if self.mix == FileType.MXFP4_MOE:
            return T.MXFP4 if len(tensor.shape) > 2 else T.Q8_0
        if kind == TensorRole.TOKEN_EMBD:
            return _TOKEN_EMBD.get(self.mix, self.mix.default)
        if kind in (TensorRole.ATTN_V, TensorRole.ATTN_QKV):
            return self._attn_v()
        if kind == TensorRole.ATTN_K and self.size.experts == _MIXTRAL_EXPERTS:
            return T.Q8_0
        if kind == TensorRole.FFN_DOWN:
            return self._ffn_down(tensor.name)
        if kind == TensorRole.ATTN_OUTPUT:
            of_8 = self.size.experts == _MIXTRAL_EXPERTS
            return (_ATTN_OUTPUT_OF_8 if of_8 else _ATTN_OUTPUT).get(self.mix, self.mix.default)
        return self.mix.default

    def _output(self, cols: int) -> GgmlType:
        if self.mix in (FileType.MXFP4_MOE, FileType.Q8_0) or cols % self.mix.default.elements:
            return T.Q8_0
        return T.Q6_K

    def _attn_v(self) -> GgmlType:
        place, self.values_met = self.values_met, self.values_met + 1
        if self.size.experts == _MIXTRAL_EXPERTS:
            return T.Q8_0
        if self.size.heads // self.size.kv_heads >= 4 and self.mix in _ATTN_V_SHARED:
            return _ATTN_V_SHARED[self.mix]
        if self.mix == FileType.Q2_K:
            return T.Q3_K
        if self.mix == FileType.Q3_K_M:
            return T.Q5_K if place < 2 else T.Q4_K
        if self.mix in (FileType.Q4_K_M, FileType.Q5_K_M) and _more_bits(place, self.num_values):
            return T.Q6_K
        if self.mix == FileType.Q4_K_S and place < 4:
            return T.Q5_K
        return _ATTN_V.get(self.mix, self.mix.default)

    def _ffn_down(self, name: str) -> GgmlType:
        place, self.downs_met = self.downs_met, self.downs_met + 1
        if self.size.experts > 1:
            place = _block_of(name) or 0
        blocks = self.size.blocks
        if self.mix == FileType.Q3_K_M:
            return T.Q5_K if place < blocks // 16 else T.Q4_K
        if self.mix in (FileType.Q4_K_M, FileType.Q5_K_M) and _more_bits(place, blocks):
            return T.Q6_K
        if self.mix in (FileType.IQ4_NL, FileType.IQ4_XS, FileType.Q4_K_S) and place < blocks // 8:
            return T.Q5_K
        return _FFN_DOWN.get(self.mix, self.mix.default)


def _more_bits(place: int, count: int) -> bool:
    """Return whether a layer is among the first and last eighths, or every third between."""
    return place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2


def _fitting(kind: GgmlType, cols: int) -> GgmlType:
    """Return the type, or its fallback if `cols` is not a multiple of the block size."""
    if cols % kind.elements == 0:
        return kind
    smaller = _FALLBACK.get(kind, kind)
    return smaller if cols % smaller.elements == 0 else T.F16
