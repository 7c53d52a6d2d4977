"""How the numbers of a matrix are stored: plain floats, FP8 with scales, ggml's blocks.

An encoding is a frozen value that answers, without any data, which physical tensors hold a matrix
of a given shape and in which units of rows it can be worked on. The arithmetic is in `kernels/`.
"""

from lingconv.encodings.dtypes import DTYPES, GgmlType, StoredType
from lingconv.encodings.fp8 import Fp8, ScaleShape
from lingconv.encodings.ggml import Ggml
from lingconv.encodings.plain import DECODABLE, PLAIN, Plain

Encoding = Plain | Fp8 | Ggml

__all__ = [
    "Encoding",
    "Fp8",
    "Ggml",
    "Plain",
    "ScaleShape",
    "encoding_from_json",
    "encoding_of",
    "encoding_to_json",
    "is_decodable",
]

# Their elements mean little without a scale of the whole tensor, which is stored apart.
_INCOMPLETE = (GgmlType.NVFP4,)


def is_decodable(encoding: Encoding) -> bool:
    """Return whether numbers can be read from it: all but plain integers and what is incomplete."""
    if isinstance(encoding, Ggml):
        return encoding.type not in _INCOMPLETE
    return isinstance(encoding, Fp8) or encoding.dtype in DECODABLE


def encoding_of(kind: StoredType) -> Plain | Ggml:
    """Return the encoding of a tensor that is stored alone, without scales beside it."""
    if isinstance(kind, GgmlType):
        return Ggml(kind) if kind.is_quantized else PLAIN[DTYPES[kind]]
    return PLAIN[kind]


def encoding_to_json(encoding: Encoding) -> dict[str, object]:
    """Return a JSON object that `encoding_from_json` turns back into the same value."""
    return {"kind": encoding.kind, **encoding.to_json()}


def encoding_from_json(value: dict[str, object]) -> Encoding:
    """Return the encoding that `encoding_to_json` described."""
    kinds: dict[object, type[Encoding]] = {kind.kind: kind for kind in (Plain, Fp8, Ggml)}
    return kinds[value["kind"]].from_json(value)
