"""config.json of a target: the source's, with the keys that a conversion changes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.encodings import quantization_config
from lingconv.model.family import PhysicalName, Role
from lingconv.model.layout import HF, Layout
from lingconv.plans.options import ConvertOptions, Mtp, TargetDType
from lingconv.plans.plan import Transfer

_LAYER = re.compile(r"\.\d+\.")
_DTYPES = {
    TargetDType.BF16: "bfloat16",
    TargetDType.F16: "float16",
    TargetDType.F32: "float32",
}


def target_config(
    model: Model, layout: Layout, options: ConvertOptions, transfers: Sequence[Transfer]
) -> dict[str, Any]:
    """Return config.json for the target; unknown keys are kept, in their order."""
    config = dict(model.checkpoint.config)
    config.update(_mtp_keys(model, options))
    if options.dtype in _DTYPES:
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = _DTYPES[TargetDType(options.dtype)]
    scaled = [t for t in transfers if t.target.encoding.has_scales]
    if not scaled:
        config.pop(quantization_config.KEY, None)
        return config
    kept = [
        transfer.target.name.removesuffix(".weight")
        for transfer in transfers
        if not transfer.target.encoding.is_quantized
        and layout.tensors[PhysicalName(transfer.target.name)].role.is_linear_module
    ]
    if options.mtp == Mtp.ONLY:
        kept += _as_sglang_names(kept, layout, model.symbols["mtp_layers"])
    stated = config.get(quantization_config.KEY)
    if options.dtype or options.mtp == Mtp.ONLY:
        quantized = {t.target.name.removesuffix(".weight"): t.target.encoding for t in scaled}
        config[quantization_config.KEY] = quantization_config.build(quantized, kept)
    elif stated and model.layout.name != layout.name:
        names = [transfer.target.name for transfer in scaled]
        config[quantization_config.KEY] = quantization_config.with_kept(stated, kept, names)
    return config


def _as_sglang_names(kept: Sequence[str], layout: Layout, layers: int) -> list[str]:
    """Return the projections of a stand-alone MTP model by the names that SGLang 0.5.23 has.

    It counts them behind the model's own layers (bailing_moe_nextn.py), and looks for them so.
    """
    projections = [
        module
        for module in kept
        if layout.tensors[PhysicalName(f"{module}.weight")].role == Role.MTP_PROJECTION
    ]
    return [_LAYER.sub(f".{layers}.", module, count=1) for module in projections]


def _mtp_keys(model: Model, options: ConvertOptions) -> Mapping[str, Any]:
    """Return the config keys that change with the number of MTP layers."""
    symbols, key = model.symbols, model.family.key
    if options.mtp == Mtp.KEEP or not symbols["mtp_layers"]:
        return {}
    if options.mtp == Mtp.DROP:
        return {key("mtp_layers", HF): 0, key("layers", HF): symbols["layers"]}
    # As Ling-V2's converter writes a stand-alone MTP model (`--mtp-path`).
    return {key("layers", HF): symbols["mtp_layers"], key("dense_layers", HF): 0}
