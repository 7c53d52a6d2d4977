"""Four bits by compressed-tensors itself: what its own functions make of a matrix, and of bytes."""

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

from lingconv.encodings.codec import BF16_BITS

FORMATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "int4": "pack-quantized",
}
ARGS = {
    "nvfp4": {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
    },
    "mxfp4": {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
        "scale_dtype": torch.uint8,
    },
    "int4": {"num_bits": 4, "type": "int", "strategy": "group"},
}  # fmt: skip


def scheme_of(kind, group=0):
    """Return the scheme of weights, and of nothing else."""
    fields = ARGS[kind] | ({"group_size": group} if group else {})
    weights = QuantizationArgs(symmetric=True, dynamic=False, **fields)
    return QuantizationScheme(targets=["Linear"], weights=weights, format=FORMATS[kind])


def compress(kind, weight, group=0):
    """Return what compressed-tensors stores of a weight, by the end of each name."""
    scheme = scheme_of(kind, group)
    width = scheme.weights.group_size
    grouped = weight.reshape(weight.shape[0], -1, width)
    low, high = grouped.amin(-1), grouped.amax(-1)
    state = {"weight": weight}
    number = None
    if kind == "nvfp4":
        number = generate_gparam(weight.amin(), weight.amax())
        state["weight_global_scale"] = number
    state["weight_scale"], _ = calculate_qparams(low, high, scheme.weights, number)
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind])
    return compressor.compress(state, scheme)


def decompress(kind, state, group=0):
    """Return the numbers of stored tensors, in BF16."""
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind])
    return compressor.decompress(dict(state), scheme_of(kind, group))["weight"]


def case(kind, encoding, group, scaling=None):
    """Return the CodecCase of an encoding of four bits in compressed-tensors' dialect."""
    from tests.kit.codecs import UNSCALED, CodecCase

    width = ARGS[kind].get("group_size", group)

    def state_of(parts, shape):
        """Return the stored tensors by the end of their names."""
        rows, cols = shape
        words = torch.int32 if kind == "int4" else torch.uint8
        state = {"weight_packed": torch.from_numpy(parts[0]).view(words).reshape(rows, -1)}
        kinds = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8, "int4": torch.bfloat16}
        stored = torch.from_numpy(parts[1]).view(kinds[kind])
        state["weight_scale"] = stored.reshape(rows, cols // width)
        if kind == "nvfp4":
            state["weight_global_scale"] = torch.from_numpy(parts[2]).view(torch.float32)
        if kind == "int4":
            state["weight_shape"] = torch.tensor(shape)
        return state

    def encode(values):
        made = compress(kind, torch.from_numpy(values).bfloat16(), group)
        names = ("weight_packed", "weight_scale", "weight_global_scale", "weight_shape")
        return [as_numpy(made[name]) for name in names if name in made]

    def decode(parts, shape):
        return decompress(kind, state_of(parts, shape), group).float().numpy()

    def scales(parts, shape):
        """Return the unit of the limit's floor for each element."""
        state = state_of(parts, shape)
        stored = state["weight_scale"].float().numpy()
        if kind == "mxfp4":
            stored = np.exp2(stored - 127)
        if kind == "nvfp4":
            cut = np.where(stored < 2**-6, 24 * 2**-10 / np.maximum(stored, 2**-10), 0)
            stored = stored / state["weight_global_scale"].numpy() * (1 + cut)
        return np.abs(stored).repeat(width, axis=1)

    def random_parts(generator, shape):
        rows, cols = shape
        groups = rows * cols // width
        codes = generator.integers(0, 256, rows * cols // 2, np.uint8)
        if kind == "mxfp4":
            return [codes, generator.integers(20, 200, groups, np.uint8)]
        if kind == "nvfp4":
            number = np.array([generator.lognormal(5, 3)], np.float32)
            return [codes, generator.integers(0, 0x7F, groups, np.uint8), number.view(np.uint8)]
        made = torch.from_numpy(generator.lognormal(-6, 4, groups).astype(np.float32))
        return [codes, as_numpy(made.bfloat16()), np.array(shape, np.int64).view(np.uint8)]

    return CodecCase(
        name=encoding.label,
        encoding=encoding,
        shape=(7, 512),
        decode=decode,
        encode=encode,
        random_parts=random_parts,
        values_in=(BF16_BITS,),
        values_out=(BF16_BITS,),
        scaling=scaling or UNSCALED,
        scales=scales,
    )


def as_numpy(tensor):
    """Return the bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()
