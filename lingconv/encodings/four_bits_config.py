"""`quantization_config` of checkpoints in four bits, in every dialect that is written.

compressed-tensors: as 0.20 writes it, a `config_groups` entry for each scheme; ModelOpt: as 0.47
exports it, with `hf_quant_config.json` beside config.json; Ling 3.0 `-fp4`: FP8's and a key.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from lingconv.encodings.base import Encoding
from lingconv.encodings.four_bits import MXFP4_GROUP, NVFP4_GROUP, Dialect, Int4, Mxfp4, Nvfp4

MODELOPT = "modelopt"
ROUTED = "routed_experts_quant_method"
MODELOPT_FILE = "hf_quant_config.json"
# The version of ModelOpt whose files are written; readers tell dialects of older ones by it.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_DIGITS = re.compile(r"\d+")


def group_of(encoding: Encoding) -> dict[str, Any]:
    """Return the entry of `config_groups` for weights of four bits, without targets.

    Raises TypeError for other encodings.
    """
    if isinstance(encoding, Nvfp4):
        weights: dict[str, Any] = {
            **_weights("float", "tensor_group", NVFP4_GROUP),
            "scale_dtype": "torch.float8_e4m3fn",
        }
        inputs = {**weights, "dynamic": "local", "observer": "static_minmax"}
        return _group("nvfp4-pack-quantized", weights, inputs if encoding.has_inputs else None)
    if isinstance(encoding, Mxfp4):
        weights = {**_weights("float", "group", MXFP4_GROUP), "scale_dtype": "torch.uint8"}
        return _group("mxfp4-pack-quantized", weights, None)
    if isinstance(encoding, Int4):
        return _group("pack-quantized", _weights("int", "group", encoding.group), None)
    raise TypeError(f"compressed-tensors has no scheme for {encoding.label}")


def _weights(kind: str, strategy: str, group: int) -> dict[str, Any]:
    return {
        "dynamic": False,
        "group_size": group,
        "num_bits": 4,
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
    }


def _group(
    name: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "format": name,
        "input_activations": inputs,
        "output_activations": None,
        "weights": dict(weights),
    }


def build_modelopt(encoding: Nvfp4, kept_modules: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint in ModelOpt's dialect."""
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_GROUP}
    inputs = {"input_activations": dict(numbers)} if encoding.has_inputs else {}
    return {
        "config_groups": {"group_0": {**inputs, "weights": numbers, "targets": ["Linear"]}},
        "ignore": list(kept_modules),
        "quant_algo": "NVFP4" if encoding.has_inputs else "W4A16_NVFP4",
        "producer": dict(_PRODUCER),
        "quant_method": MODELOPT,
    }


def modelopt_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return hf_quant_config.json, for ModelOpt's `quantization_config`; TensorRT-LLM reads it."""
    return {
        "producer": config["producer"],
        "quantization": {
            "quant_algo": config["quant_algo"],
            "kv_cache_quant_algo": None,
            "group_size": NVFP4_GROUP,
            "exclude_modules": config["ignore"],
        },
    }


def targets_of(modules: Iterable[str], others: Collection[str]) -> list[str]:
    """Return patterns that match `modules` and none of `others`, for a scheme among several.

    Modules that differ in numbers alone share one; a pattern that would match others is replaced by
    the names themselves.
    """
    by_pattern: dict[str, list[str]] = {}
    for module in modules:
        by_pattern.setdefault(_DIGITS.sub("0", module), []).append(module)
    foreign = {_DIGITS.sub("0", other) for other in others}
    found: list[str] = []
    for shape, members in by_pattern.items():
        pattern = "\\d+".join(map(re.escape, shape.split("0")))
        found += members if shape in foreign else [f"re:{pattern}$"]
    return found


def kind_of_group(weights: Mapping[str, Any]) -> str:
    """Return the `label` of the encoding that a `config_groups` entry's weights state.

    Raises ValueError for one that is not read.
    """
    kind, group = weights["type"], weights.get("group_size")
    if kind == "float" and group in (NVFP4_GROUP, MXFP4_GROUP):
        return Nvfp4.kind if group == NVFP4_GROUP else Mxfp4.kind
    if kind == "int" and weights.get("symmetric", True) and isinstance(group, int):
        return f"{Int4.kind} g{group}"
    what = "" if weights.get("symmetric", True) else "asymmetric "
    raise ValueError(f"weights are {what}{kind} of 4 bits in groups of {group}, which is not read")


def is_ling(encoding: Encoding) -> bool:
    """Return whether an encoding is that of Ling 3.0 `-fp4`, whose config is FP8's."""
    return isinstance(encoding, Mxfp4) and encoding.dialect == Dialect.LING


def is_modelopt(encoding: Encoding) -> TypeGuard[Nvfp4]:
    """Return whether an encoding is in ModelOpt's dialect."""
    return isinstance(encoding, Nvfp4) and encoding.dialect == Dialect.MODELOPT
