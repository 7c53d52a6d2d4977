"""The conveyor against `cp -r`, and against what the machine allows. Run by `make bench`.

Prints a table and writes it, with the machine, to docs/performance.md. Nothing is remembered
between runs but the compiled kernels.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import (
    LINGCONV,
    Line,
    Run,
    Sources,
    Words,
    arguments,
    beside_cp,
    run,
    synthetic,
    tell,
    workplace,
)
from lingconv.encodings.kernels import fp8_decode
from lingconv.encodings.kernels import fp8_encode as fp8

FROM_MEMORY = "from memory"


def conversions(work: Path, rounds: int) -> list[Line]:
    """Measure the jobs on a cut of Ling-mini-2.0."""
    bf16 = synthetic(work)
    fp8_sources = bf16.made("fp8", quantize)
    lines = [
        *beside_cp("BF16 -> FP8 block", bf16, quantize, rounds),
        *beside_cp("FP8 -> BF16", fp8_sources, widen, rounds, copied=bf16.large),
        *beside_cp("BF16 -> BF16, shards of 2 GB", bf16, reshard, rounds),
        *four_bits(bf16, rounds),
    ]
    bf16.remove()
    fp8_sources.remove()
    return lines


def four_bits(bf16: Sources, rounds: int) -> list[Line]:
    """Measure routed experts to four bits, with and without a search for better scales."""
    jobs = {
        "BF16 -> NVFP4": ["--nvfp4"],
        "BF16 -> MXFP4": ["--mxfp4"],
        "BF16 -> INT4": ["--int4"],
        "BF16 -> NVFP4, four over six": ["--nvfp4", "--search", "four-over-six"],
        "BF16 -> INT4, least squares": ["--int4", "--search", "mse"],
    }
    lines = []
    for job, words in jobs.items():
        bound = "2.0" if "--search" in words else "1.0"

        def command(source: Path, out: Path, words: list[str] = words) -> Words:
            return [*LINGCONV, "quantize", source, out, *words]

        first, *_ = beside_cp(job, bf16, command, rounds)
        lines.append(replace(first, bound=bound))
    return lines


def quantize(source: Path, out: Path) -> Words:
    """Return the command for BF16 to FP8."""
    return [*LINGCONV, "quantize", source, out, "--fp8"]


def widen(source: Path, out: Path) -> Words:
    """Return the command for FP8 to BF16."""
    return [*LINGCONV, "convert", source, out, "--dtype", "bf16"]


def reshard(source: Path, out: Path) -> Words:
    """Return the command that only moves bytes."""
    return [*LINGCONV, "convert", source, out, "--max-shard-size", "2GB"]


def large(work: Path) -> list[Line]:
    """Measure memory on one dense and one MoE layer of Ling-1T's dimensions."""
    source, out = work / "ling-1t-cut", work / "out"
    cut = ["--layers", "2", "--dense-layers", "1"]
    run([*LINGCONV, "synth", "ling-1t", source, *cut])
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    done = run([*LINGCONV, "quantize", source, out, "--fp8"])
    shutil.rmtree(source)
    shutil.rmtree(out)
    peak = f"{done.peak_rss_bytes / 2**20:.0f} MiB"
    job = f"peak RSS, 2 layers of Ling-1T ({nbytes / 1e9:.1f} GB) to FP8"
    return [Line(job, peak, f"{nbytes / done.seconds / 1e9:.2f} GB/s in", "", "first + 10 %")]


def planning(work: Path, rounds: int) -> list[Line]:
    """Measure planning and inspecting the full Ling-1T, and the start of the program."""
    full, shards = work / "ling-1t", "13GB"
    run([*LINGCONV, "synth", "ling-1t", full, "--headers-only", "--max-shard-size", shards])
    plan = [run([*LINGCONV, "plan", full, work / "out", "--dtype", "fp8"]) for _ in range(rounds)]
    look = [run([*LINGCONV, "inspect", full]) for _ in range(rounds)]
    start = [run([*LINGCONV, "--help"]) for _ in range(rounds)]
    count = len(list(full.glob("*.safetensors")))
    shutil.rmtree(full)

    def seconds(runs: list[Run]) -> str:
        return f"{statistics.median(r.seconds for r in runs):.2f} s"

    peak = max(r.peak_rss_bytes for r in plan) / 1e6
    return [
        Line("plan of the full Ling-1T", seconds(plan), bound="3 s"),
        Line("... its peak RSS", f"{peak:.0f} MB", bound="500 MB"),
        Line(f"inspect of Ling-1T in {count} shards", seconds(look), bound="1 s"),
        Line("lingconv --help", seconds(start), bound="0.3 s"),
    ]


def kernels(where: str, rows: int, rounds: int) -> list[Line]:
    """Measure FP8's kernels beside memcpy, turn by turn, on one thread: bytes read and written."""
    bits = np.random.default_rng(0).standard_normal((rows, 2048), np.float32).view(np.uint32)
    weights = (bits >> 16).astype(np.uint16)
    codes, scales = np.empty(weights.shape, np.uint8), np.empty((rows // 128, 16), np.float32)
    back = np.empty_like(weights)
    there = (weights, codes, scales, 128, 128, 0.0, fp8.SCALE_F32, False)
    again = (codes, scales, back, 128, 128, 0)
    memcpys: list[float] = []
    speeds: dict[str, list[float]] = {"quantize": [], "dequantize": []}
    for _ in range(rounds):
        memcpys.append(_speed(lambda: np.copyto(back, weights), 4 * weights.size))
        speeds["quantize"].append(_speed(lambda: fp8.quantize(*there), 3 * weights.size))
        speeds["dequantize"].append(_speed(lambda: fp8_decode.dequantize(*again), 3 * weights.size))
    theirs = statistics.median(memcpys)
    bound = "0.6" if where == FROM_MEMORY else ""
    return [
        Line(
            f"{name}, {where}",
            f"{statistics.median(ours):.1f} GB/s",
            f"memcpy {theirs:.1f} GB/s",
            f"{statistics.median(ours) / theirs:.2f}",
            bound,
        )
        for name, ours in speeds.items()
    ]


def _speed(work: Callable[[], object], nbytes: int) -> float:
    """Return the speed of `work`, which moves `nbytes`, in GB/s; what it needs is warm."""
    work()
    started = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - started) / 1e9


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    with workplace(wanted.work):
        lines = conversions(wanted.work, wanted.rounds) + planning(wanted.work, wanted.rounds)
        lines += large(wanted.work)
    lines += kernels("in cache", 512, 200) + kernels(FROM_MEMORY, 65536, 15)
    tell(lines, "bench", wanted)


if __name__ == "__main__":
    main()
