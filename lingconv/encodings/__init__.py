"""How the numbers of a matrix are stored: plain floats, or FP8 with scales.

An encoding is a frozen value that answers, without any data, which physical tensors hold a matrix
of a given shape and in which units of rows it can be worked on. The arithmetic is in `kernels/`.
"""

from lingconv.encodings.fp8 import Fp8, ScaleShape
from lingconv.encodings.plain import FLOATS, Plain

Encoding = Plain | Fp8

__all__ = [
    "Encoding",
    "Fp8",
    "Plain",
    "ScaleShape",
    "encoding_from_json",
    "encoding_to_json",
    "is_decodable",
]


def is_decodable(encoding: Encoding) -> bool:
    """Return whether numbers can be read from it: FP8 with scales, BF16, F16, F32."""
    return isinstance(encoding, Fp8) or encoding.dtype in FLOATS


def encoding_to_json(encoding: Encoding) -> dict[str, object]:
    """Return a JSON object that `encoding_from_json` turns back into the same value."""
    return {"kind": encoding.kind, **encoding.to_json()}


def encoding_from_json(value: dict[str, object]) -> Encoding:
    """Return the encoding that `encoding_to_json` described."""
    kinds: dict[object, type[Plain | Fp8]] = {kind.kind: kind for kind in (Plain, Fp8)}
    return kinds[value["kind"]].from_json(value)
