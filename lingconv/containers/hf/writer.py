"""Writes Hugging Face checkpoints: tensors placed in safetensors shards, and their index."""

import json
from collections.abc import Iterable

from lingconv.containers.hf import safetensors
from lingconv.containers.placement import cut, place
from lingconv.plans.plan import OutputFile, Plan, Transfer


def index_json(plan: Plan) -> bytes:
    """Return the index: where each tensor is, true bytes, logical parameters without scales."""
    weight_map = {spec.name: file.name for file in plan.files for spec in file.tensors}
    # Same text as json.dumps(..., indent=2, sort_keys=True), which takes ten times as long.
    lines = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(weight_map[name])}" for name in sorted(weight_map)
    )
    return (
        "{\n"
        '  "metadata": {\n'
        f'    "total_parameters": {plan.total_parameters},\n'
        f'    "total_size": {plan.tensor_bytes}\n'
        "  },\n"
        '  "weight_map": {\n'
        f"{lines}\n"
        "  }\n"
        "}\n"
    ).encode()


def pack_safetensors(transfers: Iterable[Transfer], max_shard_bytes: int) -> tuple[OutputFile, ...]:
    """Cut transfers into safetensors files of at most `max_shard_bytes` of data.

    A tensor is never split, so one that is larger gets a file of its own.
    """
    shards = list(cut(transfers, max_shard_bytes, max_tensors=0))
    files = []
    for index, shard in enumerate(shards):
        name = safetensors.shard_name(index, len(shards))
        ordered = safetensors.storage_order(spec for _, specs in shard for spec in specs)
        start = len(safetensors.build_header(ordered))
        files.append(place(name, shard, ordered, start, lambda spec: spec.nbytes))
    return tuple(files)
