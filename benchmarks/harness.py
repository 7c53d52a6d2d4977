"""What every benchmark is made of: commands timed turn by turn, and tables for a page.

A job is a whole command of ours, durable on disk when it ends. Beside it, in every round: `cp -r`,
which leaves the disk to the system; loops that read what the job reads and write as much as it
writes, past the cache, and do nothing else; and the same command on a tiny model, which is what a
start takes. The source is in the page cache for all of them, and what is dirty has been written.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lingconv.storage.aligned_buffers import aligned_buffer
from lingconv.storage.local_output import LocalOutput
from lingconv.storage.machine import num_processors

ROOT = Path(__file__).parents[1]
LINGCONV = [sys.executable, "-m", "lingconv"]
CALL_BYTES = 4 << 20

Words = list[str | Path]
Command = Callable[[Path, Path], Words]


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


class Sources(NamedTuple):
    """A checkpoint to measure with, and one of the same kind that is next to nothing."""

    large: Path
    tiny: Path

    def made(self, name: str, command: Command) -> "Sources":
        """Return what a command makes of both."""
        made = Sources(self.large.with_name(name), self.tiny.with_name(f"{name}-tiny"))
        for source, out in zip(self, made, strict=True):
            run(command(source, out))
        return made

    def remove(self) -> None:
        """Delete both."""
        for folder in self:
            shutil.rmtree(folder)


def synthetic(work: Path) -> Sources:
    """Make a cut of Ling-mini-2.0: real dimensions, 1 dense and 3 MoE layers, 6.3 GB."""
    made = Sources(work / "bf16", work / "bf16-tiny")
    cut = ["--layers", "4", "--max-shard-size", "1.4GB"]
    run([*LINGCONV, "synth", "ling-mini-2.0", made.large, *cut])
    run([*LINGCONV, "synth", "tiny", made.tiny])
    return made


def beside_cp(
    job: str, sources: Sources, command: Command, rounds: int, copied: Path | None = None
) -> list[Line]:
    """Time a command, `cp -r` of its source or of `copied`, loops, and its start, turn by turn."""
    out = sources.large.parent / "out"
    copied = copied or sources.large
    ours, cps, loops, starts = [], [], [], []
    for _ in range(rounds):
        warm(sources.large)
        ours.append(run(command(sources.large, out)))
        nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
        warm(copied)
        cps.append(run(["cp", "-r", copied, out]).seconds)
        shutil.rmtree(out)
        warm(sources.large)
        loops.append(loop_seconds(sources.large, nbytes, out))
        shutil.rmtree(out)
        starts.append(run(command(sources.tiny, out)).seconds)
        shutil.rmtree(out)
    return _lines(job, ours, cps, loops, starts)


def _lines(
    job: str, ours: list[Run], cps: list[float], loops: list[float], starts: list[float]
) -> list[Line]:
    """Return the lines for time, for what the machine would allow, and for memory."""
    seconds = [each.seconds for each in ours]
    mine, cp, loop, start = map(statistics.median, (seconds, cps, loops, starts))
    limit = min(cp, loop)
    which = "cp" if cp < loop else "loops"
    peak = max(each.peak_rss_bytes for each in ours) >> 20
    return [
        Line(job, spread(seconds), f"cp {spread(cps)}", f"{mine / cp:.2f}", "1.0"),
        Line(
            f"... without the {start:.2f} s of its start",
            f"{mine - start:.2f} s",
            f"{which} {spread(cps if cp < loop else loops)}",
            f"{(mine - start) / limit:.2f}",
            "1.1",
        ),
        Line("... its peak RSS", f"{peak} MiB", bound="1.2 GiB"),
    ]


def spread(seconds: list[float]) -> str:
    """Return the median, and from where to where."""
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.1f}-{max(seconds):.1f})"


def loop_seconds(source: Path, nbytes: int, out: Path) -> float:
    """Return what reading a checkpoint and writing `nbytes` takes, with nothing else to do.

    A thread for each processor reads, as many write past the cache, each to a file of its own.
    """
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    threads = num_processors()
    share = nbytes // threads // CALL_BYTES * CALL_BYTES
    started = time.perf_counter()
    with ThreadPoolExecutor(2 * threads) as pool:
        reading = [pool.submit(_read, files[n::threads]) for n in range(threads)]
        writing = [pool.submit(_write, out / str(n), share) for n in range(threads)]
        for done in (*reading, *writing):
            done.result()
    return time.perf_counter() - started


def _read(files: list[Path]) -> None:
    buffer = aligned_buffer(CALL_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _write(path: Path, nbytes: int) -> None:
    buffer = aligned_buffer(CALL_BYTES)
    output = LocalOutput(path, nbytes)
    output.reserve()
    for offset in range(0, nbytes, CALL_BYTES):
        output.write(memoryview(buffer), offset)
    output.sync()
    output.close()


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
