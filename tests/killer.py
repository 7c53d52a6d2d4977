"""Kills conversions at stated instants, runs them again, and looks at what is left.

What comes of it is to be what an undisturbed run leaves, byte for byte, and no file that was
finished when the process died may be touched again.
"""

import os
import random
from collections import Counter
from dataclasses import dataclass, field

import lingconv
from tests.kit import FILES, counts, run, sample
from tests.support import tree_digest

OPTIONS = {
    "fp8": lingconv.ConvertOptions(dtype="fp8", max_shard_bytes=150_000),
    "nvfp4": lingconv.ConvertOptions(dtype="nvfp4", max_shard_bytes=150_000),
    "gguf": lingconv.ConvertOptions(layout="gguf", gguf=lingconv.GgufOptions(outtype="q8_0")),
    "megatron": lingconv.ConvertOptions(layout="megatron", max_shard_bytes=1_500_000),
    "average": lingconv.ConvertOptions(dtype="bf16", max_shard_bytes=300_000),
}


def convert(kind, source, target, jobs):
    """Convert in small pieces; run in a child."""
    import lingconv.execution.pipeline.worker_pool
    from lingconv.api import merge_checkpoints
    from lingconv.plans.checkpoint_weights import mean

    lingconv.execution.pipeline.worker_pool.PIECE_BYTES = 100_000
    if jobs == 1:
        # Past the page cache, one write or two depend on where in memory its buffer lies.
        os.O_DIRECT = 0
    target = target / "x.gguf" if kind == "gguf" else target
    resources = lingconv.Resources(jobs=jobs)
    if kind == "average":
        # Of the same model in three encodings: FP8 by rows, by blocks, and BF16.
        sources = [f"{source}-fp8-channel", f"{source}-fp8-block-ct", source]
        merge_checkpoints(sources, target, mean(3), OPTIONS[kind], resources=resources)
    else:
        lingconv.convert(source, target, OPTIONS[kind], resources=resources)


def finished_files(target):
    """Return the weight files under their final names, each with what would change if rewritten."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for pattern in ("*.safetensors", "*.gguf", "**/__0_*.distcp")
        for path in target.glob(pattern)
    }


def finished_pieces(target):
    """Return how many pieces of unfinished files are noted."""
    journals = (target / ".lingconv").rglob("journal.jsonl")
    return sum(path.read_text().count('"piece"') for path in journals)


@dataclass
class Seen:
    """`stages` counts how far runs were when they were killed: (finished files, pieces)."""

    resumed: int = 0
    stages: Counter[tuple[int, int]] = field(default_factory=Counter)


def kill_many(kind, source, work, rounds):
    """Kill `rounds` conversions, each at another instant; return what was seen.

    Raises AssertionError for a run that was not killed where it had to be, that left other bytes
    than an undisturbed one, or that wrote a finished file again.
    """
    rng, seen = random.Random(20), Seen()
    expected, instants = None, []
    for jobs in (1, 2):
        quiet = run(convert, kind, source, work / f"quiet-{jobs}", jobs, watch=FILES)
        times = counts(quiet.trace)
        if jobs > 1:
            del times["write"]  # with O_DIRECT, there may be fewer of them next time
        instants += [(jobs, each) for each in sample(times, rounds // 2, rng)]
        digest = tree_digest(work / f"quiet-{jobs}")
        assert expected in (None, digest)
        expected = digest
    for number, (jobs, instant) in enumerate(instants):
        target = work / f"run-{number}"
        assert run(convert, kind, source, target, jobs, at=instant).killed, instant
        before = finished_files(target)
        seen.stages[len(before), finished_pieces(target)] += 1
        seen.resumed += bool(before or finished_pieces(target)) and not complete(target)
        run(convert, kind, source, target, jobs)
        after = finished_files(target)
        assert {name: after[name] for name in before} == before, instant
        assert tree_digest(target) == expected, instant
    return seen


def complete(target):
    """Whether all is there but the last step: its config.json, or the one file itself."""
    return (target / "config.json").exists() or (target / "x.gguf").exists()
