"""Megatron's ranks: the files of a checkpoint, and the shard of the model in each of them.

Sources: `initialize_model_parallel` in megatron/core/parallel_state.py (order tp-cp-ep-dp-pp),
`get_checkpoint_name` in megatron/training/checkpointing.py and `get_num_layers_to_build` in
megatron/core/transformer/transformer_block.py of github.com/NVIDIA/Megatron-LM at core_v0.16.1.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from math import lcm
from typing import Any, NamedTuple

from lingconv.errors import UsageError


class RankShare(NamedTuple):
    """Part number `rank` of `size` equal parts of a tensor."""

    rank: int
    size: int


class RankShard(NamedTuple):
    """The shard of a model on one of Megatron's ranks.

    It has the decoder's `layers`, and `experts` of each of them, numbered from 0 in the shard; the
    blocks that belong to pipeline `stages` (`first`, `last`); and its shares of the tensors that
    tensor parallelism splits, `dense` and `expert`. The vocabulary has `vocabulary` rows, padded.
    """

    layers: range
    stages: frozenset[str]
    experts: range
    dense: RankShare
    expert: RankShare
    vocabulary: int


FILE_NAME = "model_optim_rng.pt"


class Parallel(NamedTuple):
    """The degrees of parallelism of a model: tensor, pipeline and expert ranks.

    `etp` splits the tensors of experts as `tp` does the others; `vpp` is the number of model chunks
    per pipeline rank; `layers` are the numbers of decoder layers of each stage, empty if equal.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1
    layers: tuple[int, ...] = ()

    def padded(self, vocabulary: int, multiple: int) -> int:
        """Return the rows of a vocabulary padded to a multiple of `multiple` x tp, as Megatron."""
        unit = multiple * self.tp
        return -(-vocabulary // unit) * unit

    def describe(self) -> str:
        """Return the degrees of parallelism as a sentence."""
        return f"the model is spread over tp {self.tp}, pp {self.pp}, ep {self.ep}, etp {self.etp}"


class Rank(NamedTuple):
    """The rank that one file of a legacy per-rank checkpoint belongs to."""

    tp: int
    pp: int
    ep: int
    etp: int

    def folder(self, parallel: Parallel) -> str:
        """Return the folder's name in Megatron: mp_rank_TT, with _PPP and _EEE if pp, ep > 1."""
        pipeline = f"_{self.pp:03d}" if parallel.pp > 1 else ""
        expert = f"_{self.ep:03d}" if parallel.ep > 1 else ""
        return f"mp_rank_{self.tp:02d}{pipeline}{expert}"


def all_ranks(parallel: Parallel) -> list[Rank]:
    """Return the ranks that have a file of their own.

    tp varies fastest; in the experts' own grid etp does, then ep. Raises UsageError if two ranks
    with different experts would have the same file name in Megatron.
    """
    found: dict[tuple[int, int, int], Rank] = {}
    for pp in range(parallel.pp):
        for number in range(lcm(parallel.tp, parallel.etp * parallel.ep)):
            ep = number // parallel.etp % parallel.ep
            rank = Rank(number % parallel.tp, pp, ep, number % parallel.etp)
            if found.setdefault(rank[:3], rank) != rank:
                raise UsageError(
                    f"with tp {parallel.tp}, ep {parallel.ep} and etp {parallel.etp}, ranks with"
                    f" different experts share the file {rank.folder(parallel)}",
                    hint="choose a `parallel.etp` that divides `parallel.tp`, or write"
                    " `layout=megatron`",
                )
    return list(found.values())


def parts(
    parallel: Parallel, rank: Rank, symbols: Mapping[str, Any], vocabulary: int
) -> Iterator[tuple[str, RankShard]]:
    """Yield the model chunks of a rank: the key in its file, and the shard.

    `vocabulary` is the number of rows of the embedding, padding included.
    """
    experts = _even(symbols["experts"], parallel.ep, "experts", "ep") if symbols["experts"] else 0
    chunks = _chunks(parallel, symbols["layers"])
    for virtual in range(parallel.vpp):
        index = virtual * parallel.pp + rank.pp
        last = index == len(chunks) - 1
        stages = {"first"} if index == 0 else set()
        if last:
            # MTP layers embed tokens, so that the last stage has the embedding as well.
            stages |= {"last", "first"} if symbols["mtp_layers"] else {"last"}
        key = "model" if parallel.vpp == 1 else f"model{virtual}"
        yield (
            key,
            RankShard(
                chunks[index],
                frozenset(stages),
                range(rank.ep * experts, (rank.ep + 1) * experts),
                RankShare(rank.tp, parallel.tp),
                RankShare(rank.etp, parallel.etp),
                vocabulary,
            ),
        )


def _chunks(parallel: Parallel, layers: int) -> list[range]:
    """Return the decoder layers of each model chunk, in the order of the pipeline."""
    count = parallel.pp * parallel.vpp
    if not parallel.layers:
        each = _even(layers, count, "layers", "pp")
        return [range(number * each, (number + 1) * each) for number in range(count)]
    if len(parallel.layers) != count or sum(parallel.layers) != layers:
        raise UsageError(
            f"`parallel.layers` {','.join(map(str, parallel.layers))} are not {count} numbers"
            f" whose sum is {layers}"
        )
    ends = [*accumulate(parallel.layers)]
    return [range(end - n, end) for end, n in zip(ends, parallel.layers, strict=True)]


def _even(total: int, parts: int, what: str, option: str) -> int:
    if total % parts:
        hint = (
            "or say how many each stage gets, `parallel.layers=3,3,2`" if what == "layers" else ""
        )
        raise UsageError(
            f"{total} {what} cannot be spread evenly over `parallel.{option}={parts}`", hint=hint
        )
    return total // parts
