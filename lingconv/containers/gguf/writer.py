"""Writes GGUF: tensors placed in one file or a split, at the alignment of its key-values."""

from collections.abc import Iterable

from lingconv.containers.gguf import header as gguf
from lingconv.containers.placement import cut, place
from lingconv.plans.key_values import Metadata
from lingconv.plans.plan import OutputFile, Transfer

CONTAINER = "gguf"


def pack_gguf(
    transfers: Iterable[Transfer],
    metadata: Metadata,
    stem: str,
    *,
    max_shard_bytes: int | None,
    max_tensors: int,
) -> tuple[OutputFile, ...]:
    """Cut transfers into GGUF files called `stem`; a limit of None or 0 is none.

    The first file carries `metadata`, the others only what makes them part of it.
    """
    shards = list(cut(transfers, max_shard_bytes, max_tensors))
    num_tensors = sum(len(specs) for shard in shards for _, specs in shard)
    alignment = gguf.alignment_of(metadata)
    files = []
    for index, shard in enumerate(shards):
        name = gguf.shard_name(stem, index, len(shards))
        own = gguf.with_split(metadata, index, len(shards), num_tensors)
        ordered = [spec for _, specs in shard for spec in specs]
        start = len(gguf.build_header(own, ordered))
        file = place(name, shard, ordered, start, lambda spec: gguf.padded_bytes(spec, alignment))
        files.append(file._replace(container=CONTAINER, metadata=own))
    return tuple(files)
