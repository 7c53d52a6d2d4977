"""The conveyor against `cp -r`: the same bytes, the same run, page cache warm for both.

Run by `make bench`. Prints a table and writes it, with the machine, to docs/performance.md.
A cut of Ling-mini-2.0 (real dimensions, 1 dense + 3 MoE layers, 6.3 GB) is converted in several
ways; before each timed run the source is read once and everything dirty is written out. Ours are
whole commands, interpreter start included, durable on disk when they end; `cp` leaves that to the
system. Nothing is remembered between runs but the compiled kernels.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lingconv.buffers import Arena
from lingconv.kernels import fp8, fp8_decode
from lingconv.storage.output import OutputBlob

ROOT = Path(__file__).parents[1]
_DISK_BYTES = 2 << 30
_RESHARD = "BF16 -> BF16, shards of 2 GB"
LINGCONV = [sys.executable, "-m", "lingconv"]


@dataclass(frozen=True, slots=True)
class Run:
    """One timed command."""

    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table."""

    job: str
    ours: str
    yardstick: str = ""
    ratio: str = ""
    bound: str = ""


class Written(NamedTuple):
    """What a job wrote, and how long its whole command took."""

    job: str
    nbytes: int
    seconds: float


def run(command: list[str | Path]) -> Run:
    """Run a command to its end; return its time and its peak resident memory."""
    started = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    error = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"{command}: {error.decode()}")
    return Run(seconds, usage.ru_maxrss * 1024)


def warm(folder: Path) -> None:
    """Read a folder into the page cache, and let the disk catch up."""
    os.sync()
    subprocess.run(["sh", "-c", f"find {folder} -type f -exec cat {{}} + > /dev/null"], check=True)


def side_by_side(
    source: Path,
    copied: Path,
    work: Path,
    command: Callable[[Path], list[str | Path]],
    rounds: int,
) -> tuple[list[Run], list[Run]]:
    """Time a conversion of `source` and `cp -r` of `copied`, turn by turn."""
    ours, theirs = [], []
    for _ in range(rounds):
        for times, make, warmed in (
            (theirs, lambda out: ["cp", "-r", copied, out], copied),
            (ours, command, source),
        ):
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            warm(warmed)
            times.append(run(make(out)))
    shutil.rmtree(work / "out")
    return ours, theirs


def compare(job: str, ours: list[Run], theirs: list[Run]) -> list[Line]:
    """Return the lines for time and for memory."""
    mine, cp = (statistics.median(r.seconds for r in runs) for runs in (ours, theirs))
    spread = "-".join(f"{f(r.seconds for r in theirs):.1f}" for f in (min, max))
    own_spread = "-".join(f"{f(r.seconds for r in ours):.1f}" for f in (min, max))
    peak = max(r.peak_rss_bytes for r in ours) / 2**20
    return [
        Line(
            job,
            f"{mine:.2f} s ({own_spread})",
            f"cp {cp:.2f} s ({spread})",
            f"{mine / cp:.2f}",
            "1.0",
        ),
        Line("... its peak RSS", f"{peak:.0f} MiB", bound="1.2 GiB"),
    ]


def conveyor(work: Path, rounds: int) -> tuple[list[Line], list[Written]]:
    """Measure the jobs on a cut of Ling-mini-2.0; return lines, and what each job wrote."""
    source, fp8, bf16 = work / "bf16", work / "fp8", work / "bf16-again"
    synth = [*LINGCONV, "synth", "ling-mini-2.0", source, "--layers", "4"]
    run([*synth, "--max-shard-size", "1.4GB"])
    run([*LINGCONV, "quantize", source, fp8, "--fp8"])
    run([*LINGCONV, "convert", fp8, bf16, "--dtype", "bf16"])
    lines, written = [], []
    jobs: tuple[tuple[str, Path, Path, Path, list[str]], ...] = (
        ("BF16 -> FP8 block", source, source, fp8, ["quantize", "--fp8"]),
        ("FP8 -> BF16", fp8, bf16, bf16, ["convert", "--dtype", "bf16"]),
        (_RESHARD, source, source, source, ["convert", "--max-shard-size", "2GB"]),
    )
    for job, read, copied, result, (verb, *words) in jobs:

        def command(
            out: Path, verb: str = verb, read: Path = read, words: list[str] = words
        ) -> list[str | Path]:
            return [*LINGCONV, verb, read, out, *words]

        ours, theirs = side_by_side(read, copied, work, command, rounds)
        lines += compare(job, ours, theirs)
        nbytes = sum(path.stat().st_size for path in result.iterdir())
        written.append(Written(job, nbytes, statistics.median(each.seconds for each in ours)))
    shutil.rmtree(bf16)
    return lines, written


def beside_the_disk(written: list[Written], disk_bytes_per_s: float, start_s: float) -> list[Line]:
    """Return how near each job comes to what writing alone takes, once it has started."""
    lines = []
    for job, nbytes, seconds in written:
        disk_s = nbytes / disk_bytes_per_s
        lines.append(
            Line(
                f"{job}, started",
                f"{seconds - start_s:.2f} s",
                f"{nbytes / 1e9:.1f} GB of direct writes {disk_s:.2f} s",
                f"{(seconds - start_s) / disk_s:.2f}",
            )
        )
    return lines


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


def limits(work: Path, rounds: int, written: list[Written]) -> list[Line]:
    """Measure what bounds the jobs: the disk, the kernels, the start-up."""
    tiny = work / "tiny"
    run([*LINGCONV, "synth", "tiny", tiny])
    starts = []
    for _ in range(rounds):
        starts.append(run([*LINGCONV, "quantize", tiny, work / "out"]).seconds)
        shutil.rmtree(work / "out")
    disk = _speed(lambda: _write(work / "disk"), _DISK_BYTES, rounds)
    start_s = statistics.median(starts)
    return [
        Line("direct writes", f"{disk:.1f} GB/s"),
        Line("start-up", f"{start_s:.2f} s"),
        *beside_the_disk(written, disk * 1e9, start_s),
        *kernels("in cache", 512, 200),
        *kernels("from memory", 65536, 7),
    ]


def kernels(where: str, rows: int, rounds: int) -> list[Line]:
    """Measure FP8's kernels beside memcpy on one thread, in bytes read and written."""
    bits = np.random.default_rng(0).standard_normal((rows, 2048), np.float32).view(np.uint32)
    weights = (bits >> 16).astype(np.uint16)
    codes, scales = np.empty(weights.shape, np.uint8), np.empty((rows // 128, 16), np.float32)
    back = np.empty_like(weights)
    quantize = (weights, codes, scales, 128, 128, 0.0, fp8.SCALE_F32, False)
    dequantize = (codes, scales, back, 128, 128, 0)
    memcpy = _speed(lambda: np.copyto(back, weights), 4 * weights.size, rounds)
    lines = []
    for name, work in (
        ("quantize", lambda: fp8.quantize(*quantize)),
        ("dequantize", lambda: fp8_decode.dequantize(*dequantize)),
    ):
        speed = _speed(work, 3 * weights.size, rounds)
        theirs = f"memcpy {memcpy:.1f} GB/s"
        lines.append(Line(f"{name}, {where}", f"{speed:.1f} GB/s", theirs, f"{speed / memcpy:.2f}"))
    return lines


def _speed(work: Callable[[], object], nbytes: int, rounds: int) -> float:
    """Return the median speed of `work`, which moves `nbytes`, in GB/s; warmed by a first round."""
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return nbytes / statistics.median(seconds) / 1e9


def _write(path: Path) -> None:
    """Fill a file the way a run does, with nothing else to do."""
    strip = Arena().take("strip", (4 << 20,), "u1").data
    output = OutputBlob(path, _DISK_BYTES)
    for offset in range(0, _DISK_BYTES, len(strip)):
        output.write(strip, offset)
    output.sync()
    output.close()
    path.unlink()


def machine() -> str:
    """Return the machine in words."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu}, {memory:.0f} GiB of memory,"
        f" Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    )


def as_markdown(lines: list[Line]) -> str:
    """Return the table."""
    rows = [f"| {x.job} | {x.ours} | {x.yardstick} | {x.ratio} | {x.bound} |" for x in lines]
    return "\n".join(
        ["| job | lingconv | beside it | ratio | bound |", "|---|--:|--:|--:|--:|", *rows]
    )


def publish(table: str, mark: str, where: str = "") -> None:
    """Put the table between the marks of its name in docs/performance.md."""
    path = ROOT / "docs" / "performance.md"
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}{where or machine()}.\n\n{table}\n{end}{after}")


def arguments(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """Return what every benchmark may be asked on the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench", help="needs 45 GB")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--no-publish", action="store_true")
    return parser


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Make an empty folder to measure in; it is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def tell(lines: list[Line], mark: str, wanted: argparse.Namespace, where: str = "") -> None:
    """Print a table, and publish it where that is wanted."""
    table = as_markdown(lines)
    print(f"{where or machine()}\n\n{table}")
    if not wanted.no_publish:
        publish(table, mark, where)


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    with workplace(wanted.work):
        lines = planning(wanted.work, wanted.rounds)
        jobs, written = conveyor(wanted.work, wanted.rounds)
        lines = [*jobs, *lines, *large(wanted.work)]
        lines += limits(wanted.work, wanted.rounds, written)
    tell(lines, "bench", wanted)


if __name__ == "__main__":
    main()
