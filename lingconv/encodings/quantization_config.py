"""`quantization_config` in config.json: what it says, and how each dialect says it.

fp8: as DeepSeek-V3 and Ling-V2's converter write it, plus `modules_to_not_convert`, which vLLM
matches by exact module path and transformers by substring, so full paths serve both.
compressed-tensors: as llm-compressor 0.14 writes it (a `config_groups` entry per scheme).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lingconv.encodings import four_bits_config
from lingconv.encodings.base import Encoding
from lingconv.encodings.four_bits import Mxfp4, Nvfp4
from lingconv.encodings.fp8 import Fp8
from lingconv.encodings.name_pattern import select
from lingconv.errors.value_kinds import Field, Kind, Schema, checked, shown

FP8 = "fp8"
COMPRESSED_TENSORS = "compressed-tensors"
KEY = "quantization_config"
DEFAULT_BLOCK = (128, 128)

# Far beyond any axis, and kernels count in 64 bits.
_MAX_BLOCK = 1 << 62
_TEXT = Field((Kind.TEXT,))
_NAMES = Field((Kind.LIST,), items=(Kind.TEXT,))
_FIELDS: Schema = {
    "quant_method": _TEXT,
    "fmt": _TEXT,
    "scale_fmt": _TEXT,
    "modules_to_not_convert": _NAMES,
    "ignored_layers": _NAMES,
    "ignore": _NAMES,
    "config_groups": Field((Kind.OBJECT,), items=(Kind.OBJECT,)),
}
_WEIGHT_FIELDS: Schema = {"type": _TEXT, "strategy": _TEXT, "num_bits": Field((Kind.INT,))}
_KEPT_KEYS = ("modules_to_not_convert", "ignored_layers")
_SUFFIX = {FP8: "_scale_inv", COMPRESSED_TENSORS: "_scale"}


@dataclass(frozen=True, slots=True)
class StatedQuantization:
    """What a config says: the block (rows, cols; 0 for all), the modules kept, ue8m0 or not.

    `four_bits` are the labels of the encodings of four bits that it names.
    """

    method: str
    block: tuple[int, int]
    kept_modules: tuple[str, ...]
    power_of_two: bool = False
    four_bits: tuple[str, ...] = ()

    @property
    def kept_key(self) -> str:
        """The key of `quantization_config` that lists the modules kept."""
        is_fp8 = self.method == FP8
        return " or ".join(_KEPT_KEYS) if is_fp8 else "ignore"


def dialect_of(encoding: Fp8) -> str:
    """Return the dialect that an encoding's scale name belongs to."""
    return FP8 if encoding.scale_suffix == _SUFFIX[FP8] else COMPRESSED_TENSORS


def suffix_of(dialect: str) -> str:
    """Return what a dialect appends to a weight's name to name its scale."""
    return _SUFFIX[dialect]


def read(config: Mapping[str, Any]) -> StatedQuantization | None:
    """Return what config.json says about quantization, or None when it says nothing.

    Raises ValueError when it describes something other than FP8 weights.
    """
    stated = config.get(KEY)
    if stated is None:
        return None
    if not isinstance(stated, dict):
        raise ValueError(f"`{KEY}` is not an object")  # noqa: TRY004 - bad data, not a bad call
    _check(stated, _FIELDS)
    method = stated.get("quant_method")
    readers = {
        FP8: _read_fp8,
        COMPRESSED_TENSORS: _read_compressed_tensors,
        four_bits_config.MODELOPT: _read_modelopt,
    }
    if method not in readers:
        raise ValueError(f"`quant_method` is {shown(method)}; {' and '.join(readers)} are read")
    try:
        return readers[method](stated)
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"`{KEY}` is incomplete: {exc!r:.100}") from exc


def _check(stated: Mapping[str, Any], fields: Schema) -> None:
    """Raise ValueError that names a key whose value is of another type."""
    _, faults = checked(stated, fields, "")
    if faults:
        raise ValueError(f"`{KEY}`: {faults[0].message}")


def _read_fp8(stated: Mapping[str, Any]) -> StatedQuantization:
    if stated.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ValueError(f"`fmt` is {shown(stated['fmt'])}, not e4m3")
    block = stated.get("weight_block_size")
    kept = next((stated[key] for key in _KEPT_KEYS if stated.get(key)), None)
    ue8m0 = stated.get("scale_fmt") == "ue8m0"
    routed = stated.get(four_bits_config.ROUTED)
    if routed not in (None, Mxfp4.kind):
        raise ValueError(f"`{four_bits_config.ROUTED}` is {shown(routed)}, not {Mxfp4.kind}")
    four_bits = (Mxfp4.kind,) if routed else ()
    block = _block(block) if block else (0, 0)
    return StatedQuantization(FP8, block, _names(kept), ue8m0, four_bits)


def _read_compressed_tensors(stated: Mapping[str, Any]) -> StatedQuantization:
    groups = [_weights_of(group) for group in stated["config_groups"].values()]
    small = [weights for weights in groups if weights["num_bits"] == 4]
    blocks = {_read_group(weights) for weights in groups if weights["num_bits"] != 4}
    if len(blocks) > 1:
        raise ValueError("`config_groups` mix several schemes of 8 bits")
    block = blocks.pop() if blocks else DEFAULT_BLOCK
    four_bits = tuple(dict.fromkeys(map(four_bits_config.kind_of_group, small)))
    kept = _names(stated.get("ignore"))
    return StatedQuantization(COMPRESSED_TENSORS, block, kept, four_bits=four_bits)


def _read_modelopt(stated: Mapping[str, Any]) -> StatedQuantization:
    algorithm = stated.get("quant_algo")
    kept = _names(stated.get("ignore") or stated.get("exclude_modules"))
    method = four_bits_config.MODELOPT
    if algorithm == "FP8":  # one scale for each matrix
        return StatedQuantization(method, (0, 0), kept)
    if algorithm not in ("NVFP4", "W4A16_NVFP4"):
        raise ValueError(f"`quant_algo` is {shown(algorithm)}; FP8, NVFP4 and W4A16_NVFP4 are read")
    return StatedQuantization(method, DEFAULT_BLOCK, kept, four_bits=(Nvfp4.kind,))


def _weights_of(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `weights` of a group whose keys have the types that they must have."""
    weights = group["weights"]
    if not isinstance(weights, dict):
        raise ValueError(f"`{KEY}`: the weights of a group are {shown(weights)}, not {Kind.OBJECT}")  # noqa: TRY004
    _check(weights, _WEIGHT_FIELDS)
    return weights


def _read_group(weights: Mapping[str, Any]) -> tuple[int, int]:
    if weights["type"] != "float" or weights["num_bits"] != 8:
        raise ValueError(f"weights are {weights['type']} of {weights['num_bits']} bits, not FP8")
    if weights["strategy"] == "block":
        return _block(weights["block_structure"])
    blocks = {"channel": (1, 0), "tensor": (0, 0)}
    if weights["strategy"] not in blocks:
        raise ValueError(f"weight strategy {shown(weights['strategy'])} is not read")
    return blocks[weights["strategy"]]


def _names(value: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in value) if isinstance(value, list) else ()


def _block(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"block size {shown(value)} is not two numbers")
    if not all(type(size) is int and 1 <= size <= _MAX_BLOCK for size in value):
        sizes = " and ".join(map(shown, value))
        raise ValueError(f"block size {sizes} is not two positive numbers")
    return value[0], value[1]


def build(quantized: Mapping[str, Encoding], kept_modules: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint.

    `quantized` are the encodings of all quantized modules (at least one) by full path,
    `kept_modules` the full paths of the linear modules that are not quantized.
    """
    encodings = list(dict.fromkeys(quantized.values()))
    if four_bits_config.is_modelopt(encodings[0]):
        return four_bits_config.build_modelopt(encodings[0], kept_modules)
    ling = any(four_bits_config.is_ling(encoding) for encoding in encodings)
    fp8 = [encoding for encoding in encodings if isinstance(encoding, Fp8)]
    if not ling and (len(fp8) < len(encodings) or dialect_of(fp8[0]) == COMPRESSED_TENSORS):
        return _build_compressed_tensors(quantized, kept_modules)
    block = fp8[0].block(0, 0) if fp8 else DEFAULT_BLOCK
    config: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": FP8,
        "weight_block_size": list(block),
        "modules_to_not_convert": list(kept_modules),
    }
    if all(encoding.has_power_of_two_scales for encoding in encodings):
        config["scale_fmt"] = "ue8m0"
    if ling:
        config[four_bits_config.ROUTED] = "mxfp4"
    return config


def with_kept(
    stated: Mapping[str, Any], kept_modules: Sequence[str], quantized: Iterable[str]
) -> dict[str, Any]:
    """Return a `quantization_config` for the same weights under other names.

    Its list of what is not quantized stays where it still tells one from the other, and where every
    pattern in it can be read.
    """
    keys = _KEPT_KEYS if stated["quant_method"] == FP8 else ("ignore",)
    key = next((key for key in keys if stated.get(key)), keys[0])
    names = frozenset(kept_modules), frozenset(quantized)
    listed = select(_names(stated.get(key)), names[0] | names[1])
    if not listed.faults and names[0] <= listed.names and not names[1] & listed.names:
        return dict(stated)
    return {**stated, key: list(kept_modules)}


def _build_compressed_tensors(
    quantized: Mapping[str, Encoding], kept_modules: Sequence[str]
) -> dict[str, Any]:
    by_scheme: dict[str, list[str]] = {}
    schemes = {}
    for module, encoding in quantized.items():
        group = _group_of(encoding)
        key = repr(group)
        schemes[key] = group
        by_scheme.setdefault(key, []).append(module)
    groups = {}
    for number, (key, modules) in enumerate(by_scheme.items()):
        others = [name for name in quantized if name not in frozenset(modules)]
        targets = four_bits_config.targets_of(modules, others) if others else ["Linear"]
        groups[f"group_{number}"] = {**schemes[key], "targets": targets}
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": list(kept_modules),
        "kv_cache_scheme": None,
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
    }


def _group_of(encoding: Encoding) -> dict[str, Any]:
    """Return the entry of `config_groups` for an encoding, without its targets."""
    if not isinstance(encoding, Fp8):
        return four_bits_config.group_of(encoding)
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    if encoding.block_rows == 1:
        weights = {**common, "strategy": "channel", "dynamic": False}
        activations = {**common, "strategy": "token", "dynamic": True}
    else:
        block = [encoding.block_rows, encoding.block_cols]
        weights = {**common, "strategy": "block", "block_structure": block, "dynamic": False}
        activations = {
            **common,
            "strategy": "group",
            "group_size": encoding.block_cols,
            "dynamic": True,
        }
    return {
        "format": "float-quantized",
        "input_activations": activations,
        "output_activations": None,
        "weights": weights,
    }
