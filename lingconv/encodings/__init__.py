"""Encodings of stored matrices: plain floats, FP8 with scales, four bits, ggml's blocks.

`base.Encoding` is the frozen value, `codec.Codec` its arithmetic, `kernels/` the compiled loops.
Another package can add an encoding to plans, and a format that writes it: an entry point of the
group `lingconv.encodings` that names a subclass of Encoding. Which stored tensors are recognised,
and what `dtype` asks for, is fixed here (`checkpoint/tensor_matching.py`, `plans/options.py`).
"""

from functools import cache

from lingconv.encodings.base import Encoding
from lingconv.encodings.dtypes import DTYPES, GgmlType, StoredType
from lingconv.encodings.four_bits import Int4, Mxfp4, Nvfp4
from lingconv.encodings.fp8 import Fp8, ScaleShape
from lingconv.encodings.ggml import Ggml
from lingconv.encodings.plain import PLAIN, Plain
from lingconv.errors import UsageError

__all__ = [
    "Encoding",
    "Fp8",
    "Ggml",
    "Int4",
    "Mxfp4",
    "Nvfp4",
    "Plain",
    "ScaleShape",
    "encoding_from_json",
    "encoding_of",
    "encoding_to_json",
]

ENTRY_POINTS = "lingconv.encodings"
_BUILT_IN: dict[str, type[Encoding]] = {
    kind.kind: kind for kind in (Plain, Fp8, Ggml, Nvfp4, Mxfp4, Int4)
}


def encoding_of(kind: StoredType) -> Plain | Ggml:
    """Return the encoding of a tensor without a scale tensor."""
    if isinstance(kind, GgmlType):
        return Ggml(kind) if kind.is_quantized else PLAIN[DTYPES[kind]]
    return PLAIN[kind]


def encoding_to_json(encoding: Encoding) -> dict[str, object]:
    """Return an encoding as a JSON object, for `encoding_from_json`."""
    return {"kind": encoding.kind, **encoding.to_json()}


def encoding_from_json(value: dict[str, object]) -> Encoding:
    """Return the encoding of a JSON object from `encoding_to_json`.

    Raises UsageError for a kind that no installed package has.
    """
    return _kind_named(str(value["kind"])).from_json(value)


@cache
def _kind_named(name: str) -> type[Encoding]:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    from importlib.metadata import entry_points  # slow, and for kinds of other packages only

    for point in entry_points(group=ENTRY_POINTS, name=name):
        kind: type[Encoding] = point.load()
        return kind
    raise UsageError(f"no encoding is called `{name}`", hint="install the package that brings it")
