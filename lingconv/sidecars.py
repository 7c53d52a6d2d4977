"""The small files of a checkpoint: config.json, the index, lingconv.json, what Megatron wants."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lingconv.checkpoint import CARD_NAME, CONFIG_NAME, RECORD_NAME
from lingconv.containers import TensorSpec
from lingconv.containers.pickles import dumps
from lingconv.containers.safetensors import INDEX_NAME, SINGLE_NAME
from lingconv.containers.torch_archive import build_archive
from lingconv.containers.torch_dist import (
    COMMON_NAME,
    FORMAT,
    FORMAT_NAME,
    METADATA_NAME,
    SUFFIX,
    Chunk,
    Place,
    Tensor,
    write_metadata,
)
from lingconv.dtypes import DTYPES
from lingconv.framing import archives
from lingconv.metadata.megatron import ITERATION, common_state
from lingconv.options import Target
from lingconv.plans import Plan
from lingconv.readers.megatron import TRACKER_NAME

ITERATION_FOLDER = f"iter_{ITERATION:07d}/"


def last_files(
    plan: Plan, source_record: Mapping[str, Any] | None, base_card: str, version: str
) -> dict[str, bytes]:
    """Return the files that make a checkpoint complete, in the order they are to be written.

    `source_record` and `base_card` are the lingconv.json and the README.md of the base.
    """
    makers: dict[str, Callable[[], bytes]] = {
        INDEX_NAME: lambda: index_json(plan),
        RECORD_NAME: lambda: record_json(plan, source_record, version),
        CARD_NAME: lambda: _card(plan, source_record, base_card, version),
        CONFIG_NAME: lambda: _json(plan.config),
        ITERATION_FOLDER + COMMON_NAME: lambda: _common(plan),
        ITERATION_FOLDER + FORMAT_NAME: lambda: json.dumps(FORMAT).encode(),
        ITERATION_FOLDER + _STATES_NAME: lambda: _EMPTY_STATE * num_states(plan),
        ITERATION_FOLDER + METADATA_NAME: lambda: write_metadata(
            tensors_of(plan), objects_of(plan)
        ),
        TRACKER_NAME: lambda: f"{ITERATION}\n".encode(),
    }
    return {name: makers[name]() for name in last_names(plan)}


def last_names(plan: Plan) -> list[str]:
    """Return the names of those files: GGUF needs none, a single safetensors file no index."""
    if plan.options.layout == Target.GGUF:
        return []
    card = [CARD_NAME] if plan.weighting else []
    if plan.options.layout == Target.MEGATRON:
        inner = (_STATES_NAME, COMMON_NAME, FORMAT_NAME, METADATA_NAME)
        own = [ITERATION_FOLDER + name for name in inner]
        return [*own, RECORD_NAME, *card, CONFIG_NAME, TRACKER_NAME]
    if plan.options.layout == Target.RANKS:
        return [RECORD_NAME, *card, CONFIG_NAME, TRACKER_NAME]
    single = [file.name for file in plan.files] == [SINGLE_NAME]
    index = [] if single else [INDEX_NAME]
    return [*index, RECORD_NAME, *card, CONFIG_NAME]


def tensors_of(plan: Plan) -> Iterator[Tensor]:
    """Yield the tensors of a torch_dist target, each with all its chunks."""
    chunks: dict[str, list[tuple[TensorSpec, Place]]] = {}
    for file in plan.files:
        start = 0
        for spec, archive in zip(file.tensors, archives(file), strict=True):
            name = file.name.removeprefix(ITERATION_FOLDER)
            place = Place(name, start, archive.end - start)
            chunks.setdefault(spec.name, []).append((spec, place))
            start = archive.end
    for name, held in chunks.items():
        ends = [tuple(map(sum, zip(spec.offsets, spec.shape, strict=True))) for spec, _ in held]
        shape = tuple(map(max, zip(*ends, strict=True)))
        boxes = tuple(Chunk(spec.offsets, spec.shape, place) for spec, place in held)
        yield Tensor(name, DTYPES[held[0][0].dtype.value], shape, boxes)


def num_states(plan: Plan) -> int:
    """Return how many states of modules there are, each shard counted."""
    return sum(shards for _, shards in plan.states)


def objects_of(plan: Plan) -> Iterator[tuple[str, Place]]:
    """Yield the modules' states of a torch_dist target by key, and where they are."""
    keys = (f"{key}/shard_{n}_{shards}" for key, shards in plan.states for n in range(shards))
    for number, key in enumerate(keys):
        yield key, Place(_STATES_NAME, number * len(_EMPTY_STATE), len(_EMPTY_STATE))


def _small_archive(value: Any) -> bytes:
    """Return an archive without tensors."""
    return b"".join(part.data for part in build_archive(0, dumps(value), {}).parts)


# Megatron saves the objects of a key as a list; None is the state of a module that has none.
_STATES_NAME = f"__1_0{SUFFIX}"
_EMPTY_STATE = _small_archive([None])


def _common(plan: Plan) -> bytes:
    """Return common.pt."""
    return _small_archive(common_state(plan.args or {}))


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


def record_of(plan: Plan, source_record: Mapping[str, Any] | None, version: str) -> dict[str, Any]:
    """Return lingconv.json: where these weights come from and what was done to them."""
    reasons: dict[str, dict[str, int]] = {}
    for item in plan.dropped:
        entry = reasons.setdefault(item.reason, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += item.nbytes
    record: dict[str, Any] = {
        "schema": "lingconv.record/1",
        "lingconv": version,
        "source": plan.source,
        "revision": plan.sources[-1].revision,
        "family": plan.family,
        "plan_digest": plan.digest,
        "options": plan.options.to_json(),
        "encodings": plan.encodings,
        "dropped": reasons,
    }
    if plan.weighting:
        record["weighting"] = plan.weighting
        record["sources"] = [
            {"uri": source.uri, "revision": source.revision, "weight": source.weight}
            for source in plan.sources
        ]
    if source_record is not None:
        record["source_record"] = source_record
    return record


def record_json(plan: Plan, source_record: Mapping[str, Any] | None, version: str) -> bytes:
    """Return lingconv.json."""
    return _json(record_of(plan, source_record, version))


def _card(
    plan: Plan, source_record: Mapping[str, Any] | None, base_card: str, version: str
) -> bytes:
    from lingconv.hub import card  # with huggingface_hub, which nothing else here needs

    described = card.Described(record_of(plan, source_record, version), plan.config, base_card)
    return card.model_card(described).encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
