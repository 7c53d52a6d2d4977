"""The script that people write: each shard loaded, quantized tensor by tensor, saved.

    python -m benchmarks.usual_torch SRC DST

It is here to be measured beside, as such scripts are found next to published FP8 checkpoints: whole
shards in memory, no resuming, blocks of 128 x 128 padded with zeros.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

QUANTIZED = re.compile(r"(query_key_value|dense|gate_proj|up_proj|down_proj)\.weight$")
BLOCK = 128


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and the inverse scales of a matrix, block by block."""
    rows, cols = weight.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-cols // BLOCK) * BLOCK)
    padded[:rows, :cols] = weight
    view = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = view.abs().amax(dim=(1, 3), keepdim=True).clamp(1e-4) / 448.0
    codes = (view / scale).to(torch.float8_e4m3fn).view_as(padded)[:rows, :cols]
    return codes.contiguous(), scale.view(scale.shape[0], scale.shape[2])


def main(source: Path, target: Path) -> None:
    target.mkdir()
    places = {}
    for path in sorted(source.glob("*.safetensors")):
        found = {}
        for name, tensor in load_file(path).items():
            if QUANTIZED.search(name):
                found[name], found[f"{name}_scale_inv"] = quantize(tensor)
            else:
                found[name] = tensor
        save_file(found, target / path.name, {"format": "pt"})
        places |= dict.fromkeys(found, path.name)
    index = {"metadata": {}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(source / "config.json", target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
