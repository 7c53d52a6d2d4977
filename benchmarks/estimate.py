"""What `plan --estimate` predicts beside what the runs take, and what Ling-1T takes on paper.

    python -m benchmarks.estimate

Run by `make bench`. Cuts of Ling-mini-2.0 of several sizes are predicted, each from a calibration
of its own, then converted; page cache warm for both. On paper, machines are described by what
limits them, and the same arithmetic (`lingconv.estimate`) takes it from there, with the plan of the
whole Ling-1T.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.harness import (
    LINGCONV,
    Line,
    arguments,
    publish,
    run,
    tell,
    warm,
    workplace,
)
from lingconv import ConvertOptions, GgufOptions, Plan
from lingconv.api import synthetic_model
from lingconv.execution.estimate import Profile, by_kind, estimate
from lingconv.planner.planner import build_plan
from lingconv.plans.plan import Transfer

# The default budget for buffers, and the interpreter: the most that a process holds.
_RSS_BYTES = 1200 << 20
_START_S = 1.5
# What one process read a second on 16 cores, nothing but memory around it (`benchmarks.cuda`).
_PROCESS_BYTES = 4.1e9
# Weights a second and thread, as `benchmarks.conveyor` and `benchmarks.gguf` measure them.
_FP8_SPEED = 4.0e9
_K_QUANT_SPEED = 97e6  # Q4_K, the slowest of a Q4_K_M


@dataclass(frozen=True, slots=True)
class Machine:
    """What limits a machine: threads, bytes a second from and to its disk, and over its network.

    On a machine with `one_disk` reading and writing share it. `parts` are processes (`--part`).
    """

    name: str
    threads: int
    read: float
    write: float
    network: float
    count: int = 1
    parts: int = 1
    one_disk: bool = True

    def profile(self, plan: Plan, *, reads_far: bool, writes_far: bool) -> Profile:
        """Return how fast it writes each way of moving bytes that a plan has."""
        rates = {}
        for kind, (nbytes, transfers) in by_kind(plan).items():
            elements = sum(transfer.rows * transfer.cols for transfer in transfers)
            bytes_in = sum(map(_bytes_in, transfers))
            read_s = 0 if reads_far else bytes_in / self.read
            write_s = 0 if writes_far else nbytes / self.write
            disk_s = read_s + write_s if self.one_disk else max(read_s, write_s)
            speed = _K_QUANT_SPEED if "_k" in kind else _FP8_SPEED
            work_s = max(elements / speed / self.threads, bytes_in / _PROCESS_BYTES / self.parts)
            rates[kind] = nbytes / max(disk_s, work_s)
        return Profile(rates, _START_S, _RSS_BYTES * self.parts)


def _bytes_in(transfer: Transfer) -> int:
    return sum(s.num_rows * s.source.encoding.row_bytes(s.num_cols) for s in transfer.segments)


LAPTOP = Machine("a laptop, 8 cores, 1 Gbit/s", 8, 3.5e9, 2.5e9, 125e6)
SERVER = Machine(
    "an 8-GPU server, 96 cores, NVMe 25 / 12 GB/s, 8 parts",
    96,
    25e9,
    12e9,
    3.1e9,
    parts=8,
    one_disk=False,
)
NODES = Machine(
    "16 nodes of 32 cores, a parallel file system at 3 / 2 GB/s each",
    32, 3e9, 2e9, 3.1e9, count=16, one_disk=False,
)  # fmt: skip
FP8 = ConvertOptions(dtype="fp8", max_shard_bytes=10 * 10**9)
Q4_K_M = ConvertOptions(
    layout="gguf", gguf=GgufOptions(outtype="q4_k_m"), max_shard_bytes=40 * 10**9
)


def on_paper() -> list[str]:
    """Return the rows of the table for Ling-1T."""
    model = synthetic_model("ling-1t")
    plans = {"FP8": build_plan(model, FP8), "Q4_K_M": build_plan(model, Q4_K_M)}
    rows = [
        "| job | machine | time | what bounds it | memory, at most | disk | network |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for job, words, target, reads_far, writes_far in (
        ("FP8", "hub -> hub", LAPTOP, True, True),
        ("Q4_K_M", "hub -> disk", LAPTOP, True, False),
        ("FP8", "disk -> disk", SERVER, False, False),
        ("Q4_K_M", "disk -> disk", SERVER, False, False),
        ("FP8", "disk -> disk", NODES, False, False),
    ):
        plan = plans[job]
        profile = target.profile(plan, reads_far=reads_far, writes_far=writes_far)
        found = estimate(
            plan,
            profile,
            machines=target.count,
            network_bytes_per_s=target.network if reads_far or writes_far else 0.0,
            reads_far=reads_far,
            writes_far=writes_far,
        )
        largest = max(file.nbytes for file in plan.files)
        disk = 2 * largest if writes_far else plan.write_bytes
        network = found.network_in_bytes + found.network_out_bytes
        bound = "network" if found.network_s > found.convert_s else "disk or threads"
        rows.append(
            f"| Ling-1T to {job}, {words} | {target.name} | {_duration(found.seconds)} | {bound}"
            f" | {found.rss_bytes / 2**30:.1f} GiB | {disk / 1e9:,.0f} GB"
            f" | {network / 1e12:.1f} TB |"
        )
    return rows


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def predictions(work: Path, rounds: int) -> list[Line]:
    """Predict and run conversions of several sizes."""
    lines = []
    for layers in ("2", "4", "8"):
        source, out = work / "source", work / "out"
        cut = ["--layers", layers, "--max-shard-size", "1GB"]
        run([*LINGCONV, "synth", "ling-mini-2.0", source, *cut])
        nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        shards = ["--max-shard-size", "500MB"]
        ask = [*LINGCONV, "plan", source, out, "--dtype", "fp8", *shards, "--estimate", "--json"]
        do = [*LINGCONV, "quantize", source, out, *shards, "--json"]
        foretold, taken, peak = [], [], 0
        for _ in range(rounds):
            warm(source)
            foretold.append(json.loads(_output(ask))["estimate"]["seconds"])
            warm(source)
            taken.append(json.loads(_output(do))["seconds"])
            shutil.rmtree(out)
            peak = max(peak, run(do).peak_rss_bytes)
            shutil.rmtree(out)
        said, real = median(foretold), median(taken)
        lines.append(
            Line(
                f"BF16 -> FP8, {nbytes / 1e9:.1f} GB",
                f"said {said:.2f} s ({min(foretold):.1f}-{max(foretold):.1f})",
                f"took {real:.2f} s ({min(taken):.1f}-{max(taken):.1f}), {peak / 2**20:.0f} MiB",
                f"{said / real:.2f}",
                "0.75-1.25",
            )
        )
        shutil.rmtree(source)
    return lines


def _output(command: list[str | Path]) -> bytes:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    with workplace(wanted.work):
        lines = predictions(wanted.work, wanted.rounds)
    tell(lines, "estimate", wanted)
    paper = "\n".join(on_paper())
    print(f"\n{paper}")
    if not wanted.no_publish:
        publish(paper, "paper", "On paper, from what limits each machine")


if __name__ == "__main__":
    main()
