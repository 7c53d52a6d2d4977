"""Kills conversions and checks what is left. Run as a program by test_engine.py.

Every other run is killed at a random instant; the ones between them right after a random line of
the journal, so that what they leave does not depend on the speed of the machine. One process loads
everything once and forks a real process for each run, so that a hundred runs are killed in seconds.
Prints a JSON object with what it saw.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import lingconv
import lingconv.execution.pipeline.transcoder
import lingconv.execution.pipeline.worker_pool
from lingconv.api import merge_checkpoints
from lingconv.execution.journal import Journal
from lingconv.plans.checkpoint_weights import mean
from tests.noted import Noted
from tests.support import tree_digest

OPTIONS = {
    "fp8": lingconv.ConvertOptions(dtype="fp8", max_shard_bytes=150_000),
    "gguf": lingconv.ConvertOptions(layout="gguf", gguf=lingconv.GgufOptions(outtype="q8_0")),
    "megatron": lingconv.ConvertOptions(layout="megatron", max_shard_bytes=1_500_000),
    "average": lingconv.ConvertOptions(dtype="bf16", max_shard_bytes=300_000),
}
KIND = sys.argv[4]
lingconv.execution.pipeline.worker_pool.PIECE_BYTES = 100_000


def convert(source, target):
    target = target / "x.gguf" if KIND == "gguf" else target
    resources = lingconv.Resources(jobs=2)
    if KIND == "average":
        # Of the same model in three encodings: FP8 by rows, by blocks, and BF16.
        sources = [f"{source}-fp8-channel", f"{source}-fp8-block-ct", source]
        merge_checkpoints(sources, target, mean(3), OPTIONS[KIND], resources=resources)
    else:
        lingconv.convert(source, target, OPTIONS[KIND], resources=resources)


def in_child(source, target, last_note=0):
    """Start a conversion in a process of its own; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        Journal._note = Noted(last_note)
        convert(source, target)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


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


def main(source, work, rounds):
    undisturbed = work / "undisturbed"
    convert(source, undisturbed)  # compiles the kernels, too
    started = time.monotonic()
    Journal._note = noted = Noted(0)
    convert(source, work / "timed")
    duration = time.monotonic() - started
    Journal._note = noted.note
    expected = tree_digest(undisturbed)
    rng = random.Random(20)
    seen = {"killed": 0, "resumed": 0, "rewritten": 0, "different": 0, "failed": 0, "stages": 0}
    stages = set()
    for number in range(rounds):
        target = work / f"run-{number}"
        if number % 2:
            child = in_child(source, target, rng.randint(1, noted.count - 1))
        else:
            child = in_child(source, target)
            time.sleep(rng.uniform(0, 1.3 * duration))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        seen["killed"] += os.WIFSIGNALED(status)
        before = finished_files(target)
        stages.add((len(before), finished_pieces(target)))
        files = [name for name in expected if name.endswith((".safetensors", ".gguf", "0.distcp"))]
        begun = len(before) or finished_pieces(target)
        seen["resumed"] += begun > 0 and len(before) < len(files)
        _, status = os.waitpid(in_child(source, target), 0)
        seen["failed"] += status != 0
        after = finished_files(target)
        seen["rewritten"] += sum(after[name] != stat for name, stat in before.items())
        seen["different"] += tree_digest(target) != expected
    seen["stages"] = len(stages)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
