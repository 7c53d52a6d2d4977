"""config.json made of a family and its symbols, for formats that do not have one."""

from collections.abc import Mapping
from typing import Any

from lingconv.encodings.dtypes import DType
from lingconv.model.family import Family
from lingconv.plans.options import Target

# What config.json calls the dtype of most weights.
DTYPE_NAMES = {DType.BF16: "bfloat16", DType.F16: "float16", DType.F32: "float32"}


def rebuild_config(
    family: Family,
    architecture: str,
    symbols: Mapping[str, Any],
    dtype: DType,
    token_ids: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return config.json; `dtype` is what most weights are to be held in."""
    config: dict[str, Any] = {"architectures": [architecture]}
    config.update(family.config)
    for symbol in family.symbols:
        value = symbol.written(Target.HF, symbols)
        if value is not None:
            _put(config, symbol.key(Target.HF), value)
    config.update(token_ids or {})
    config["torch_dtype"] = DTYPE_NAMES.get(dtype, "bfloat16")
    return config


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key whose dots lead into nested objects."""
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value
