"""From one repository to another, beside doing it step by step: download, convert, upload.

Run by `make bench`. The Hub is the one of the tests, on this machine: it shares the cores with what
is measured, and answers as fast as Python does. So the seconds say little, the ratio says what
overlapping is worth, and memory and disk are what they are anywhere.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from benchmarks.harness import (
    LINGCONV,
    Line,
    Run,
    arguments,
    run,
    tell,
    workplace,
)
from tests.hub_server import Hub
from tests.hub_support import environment, weight_bytes

SOURCE = "bench/Ling-mini-2.0-cut"
FILE_BYTES = "500MB"
_DOWNLOAD = (
    "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
)


@contextmanager
def sampled(measure: Callable[[], int], every_s: float) -> Iterator[list[int]]:
    """Measure something again and again meanwhile; yields the list of what was found."""
    found: list[int] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            found.append(measure())
            time.sleep(every_s)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def serve(pipe: Connection, folder: Path) -> None:
    """Be the Hub, in a process of its own: what it holds must not count as another's memory."""
    with Hub() as hub:
        hub.add(SOURCE, {path.name: path.read_bytes() for path in folder.glob("[!.]*")})
        kept = set(hub.blobs)
        pipe.send(hub.endpoint)
        while pipe.recv():
            hub.repositories.pop("bench/out")
            for digest in set(hub.blobs) - kept:
                del hub.blobs[digest]
            pipe.send(None)


def hub_to_hub(work: Path, rounds: int) -> list[Line]:
    """Measure a conversion to FP8 through byte ranges, through whole files, and in three steps."""
    source = work / "source"
    run([*LINGCONV, "synth", "ling-mini-2.0", source, "--layers", "2",
         "--max-shard-size", FILE_BYTES])  # fmt: skip
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    spawned = get_context("spawn")
    mine, pipe = spawned.Pipe()
    server = spawned.Process(target=serve, args=(pipe, source), daemon=True)
    server.start()
    os.environ.update(environment(mine.recv(), work / "home"))
    shutil.rmtree(source)
    ways = {
        "byte ranges": lambda: straight(work, []),
        "whole files": lambda: straight(work, ["--download"]),
        "steps": lambda: in_steps(work),
    }
    times: dict[str, list[Run]] = {way: [] for way in ways}
    disk = dict.fromkeys(ways, 0)
    for number in range(rounds + 1):
        for way, measure in ways.items():
            with sampled(lambda: weight_bytes(work), 0.02) as found:
                timed = measure()
            mine.send("reset")
            mine.recv()
            if number:  # the first round compiles kernels
                times[way].append(timed)
                disk[way] = max(disk[way], *found)
    mine.send(None)
    server.join()
    seconds = {way: median(run.seconds for run in runs) for way, runs in times.items()}
    theirs = f"in three steps {seconds['steps']:.1f} s"
    lines = []
    for way in ("byte ranges", "whole files"):
        peak = max(run.peak_rss_bytes for run in times[way])
        lines += [
            Line(
                f"{nbytes / 1e9:.1f} GB, BF16 -> FP8, {way}",
                f"{seconds[way]:.1f} s",
                theirs,
                f"{seconds[way] / seconds['steps']:.2f}",
            ),
            Line("... its peak RSS", f"{peak >> 20} MiB", bound="1.2 GiB"),
            Line(
                "... most disk that weights took",
                f"{disk[way] / 1e9:.2f} GB",
                f"in three steps {disk['steps'] / 1e9:.2f} GB",
            ),
        ]
    return lines


def straight(work: Path, words: list[str]) -> Run:
    """Convert from repository to repository."""
    staging = work / "staging"
    timed = run([*LINGCONV, "quantize", f"hf://{SOURCE}", "hf://bench/out", "--create",
                 "--max-shard-size", FILE_BYTES, "--staging", staging, *words])  # fmt: skip
    shutil.rmtree(staging)
    return timed


def in_steps(work: Path) -> Run:
    """Download, convert, push: three commands."""
    started = time.monotonic()
    down, out = work / "down", work / "fp8"
    steps = [
        run([sys.executable, "-c", _DOWNLOAD, SOURCE, down]),
        run([*LINGCONV, "quantize", down, out, "--max-shard-size", FILE_BYTES]),
        run([*LINGCONV, "push", out, "hf://bench/out", "--create"]),
    ]
    seconds = time.monotonic() - started
    shutil.rmtree(down)
    shutil.rmtree(out)
    return Run(seconds, max(step.peak_rss_bytes for step in steps))


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    with workplace(wanted.work):
        lines = hub_to_hub(wanted.work, wanted.rounds)
    tell(lines, "hub", wanted)


if __name__ == "__main__":
    main()
