"""What torch_dist has beside its chunks: common.pt, module states, the lists of .metadata."""

from collections.abc import Iterator
from typing import Any

from lingconv.containers.megatron.archives import archives
from lingconv.containers.megatron.args import ITERATION, common_state
from lingconv.containers.megatron.dcp_metadata import SUFFIX, Chunk, FilePlace, ShardedTensor
from lingconv.containers.megatron.pickles import dumps
from lingconv.containers.megatron.torch_archive import build_archive
from lingconv.encodings.dtypes import DTYPES
from lingconv.encodings.tensor_spec import TensorSpec
from lingconv.plans.plan import Plan

ITERATION_FOLDER = f"iter_{ITERATION:07d}/"


def tensors_of(plan: Plan) -> Iterator[ShardedTensor]:
    """Yield the tensors of a torch_dist target, each with all its chunks."""
    chunks: dict[str, list[tuple[TensorSpec, FilePlace]]] = {}
    for file in plan.files:
        start = 0
        for spec, archive in zip(file.tensors, archives(file), strict=True):
            name = file.name.removeprefix(ITERATION_FOLDER)
            place = FilePlace(name, start, archive.end - start)
            chunks.setdefault(spec.name, []).append((spec, place))
            start = archive.end
    for name, held in chunks.items():
        ends = [tuple(map(sum, zip(spec.offsets, spec.shape, strict=True))) for spec, _ in held]
        shape = tuple(map(max, zip(*ends, strict=True)))
        boxes = tuple(Chunk(spec.offsets, spec.shape, place) for spec, place in held)
        yield ShardedTensor(name, DTYPES[held[0][0].dtype.value], shape, boxes)


def num_states(plan: Plan) -> int:
    """Return how many states of modules there are, each shard counted."""
    return sum(shards for _, shards in plan.states)


def objects_of(plan: Plan) -> Iterator[tuple[str, FilePlace]]:
    """Yield the modules' states of a torch_dist target by key, and where they are."""
    keys = (f"{key}/shard_{n}_{shards}" for key, shards in plan.states for n in range(shards))
    for number, key in enumerate(keys):
        yield key, FilePlace(STATES_NAME, number * len(EMPTY_STATE), len(EMPTY_STATE))


def _small_archive(value: Any) -> bytes:
    """Return an archive without tensors."""
    return b"".join(part.data for part in build_archive(0, dumps(value), {}).parts)


# Megatron saves the objects of a key as a list; None is the state of a module that has none.
STATES_NAME = f"__1_0{SUFFIX}"
EMPTY_STATE = _small_archive([None])


def common(plan: Plan) -> bytes:
    """Return common.pt."""
    return _small_archive(common_state(plan.args or {}))
