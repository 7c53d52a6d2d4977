"""What several tests need: reading with the real library, breaking files, an independent oracle."""

import hashlib
import json
import math
import shutil
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lingconv.containers.registry import format_of

INDEX = "model.safetensors.index.json"
E4M3 = torch.float8_e4m3fn


def read_tensors(folder):
    """Return all tensors of a checkpoint, read by the real safetensors library."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def same_bits(left, right):
    """Whether two tensors agree in dtype, shape and every bit."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
        if left.dim()
        else torch.equal(left, right)
    )


def assert_same_model(left, right):
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = read_tensors(left), read_tensors(right)
    assert a.keys() == b.keys()
    assert [name for name in a if not same_bits(a[name], b[name])] == []


def tree_digest(folder):
    """Return path -> sha256 of every file that a run leaves behind, its own state included.

    But for what says which files these are: inodes and times differ from run to run.
    """
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "files.json"
    }


def read_header(path):
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def header_of(file):
    """Return what a planned file has before its elements."""
    return b"".join(part.data for part in format_of(file).frames(file))


def write_raw(path, header, data=b""):
    """Write a safetensors file with any header: an object, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_json(path, change):
    value = json.loads(Path(path).read_text())
    change(value)
    Path(path).write_text(json.dumps(value))


def rewrite(folder, change):
    """Load all tensors, let `change` alter the dict, and save one file without an index."""
    tensors = read_tensors(folder)
    change(tensors)
    for path in [*Path(folder).glob("*.safetensors"), Path(folder) / INDEX]:
        path.unlink(missing_ok=True)
    save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})


def copy_checkpoint(source, target):
    shutil.copytree(source, target)
    return target


def ceil_div(a, b):
    return -(-a // b)


def blocks_of(weight, rows, cols):
    """Yield (slice, slice) of each block."""
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], cols):
            yield slice(top, top + rows), slice(left, left + cols)


def reference_quantize(weight, rows=128, cols=128, min_amax=0.0, ue8m0=False, bf16_scale=False):
    """Quantize block by block in plain torch: the definition that the kernels must equal."""
    weight = weight.float()
    cols = cols or weight.shape[1]
    codes = torch.empty(weight.shape, dtype=E4M3)
    grid = (ceil_div(weight.shape[0], rows), ceil_div(weight.shape[1], cols))
    scales = torch.empty(grid, dtype=torch.float32)
    for where in blocks_of(weight, rows, cols):
        block = weight[where]
        amax = block.abs().max().clamp(min=min_amax)
        scale = amax / 448.0
        if bf16_scale:
            scale = scale.bfloat16().float()
        if ue8m0 and scale > 0:
            mantissa, exponent = math.frexp(scale.item())
            power = exponent - 1 if mantissa == 0.5 else exponent
            scale = torch.tensor(2.0 ** min(max(power, -127), 127))
        if scale == 0:
            scale = torch.tensor(1.0)
        codes[where] = (block / scale).clamp(-448, 448).to(E4M3)
        scales[where[0].start // rows, where[1].start // cols] = scale
    return codes, scales


def reference_dequantize(codes, scales, rows=128, cols=128, dtype=torch.bfloat16):
    """Return round(float32(q) * float32(scale))."""
    cols = cols or codes.shape[1]
    wide = scales.float().repeat_interleave(rows, 0)[: codes.shape[0]]
    wide = wide.repeat_interleave(cols, 1)[:, : codes.shape[1]]
    return (codes.float() * wide).to(dtype)
