"""Experts stacked beside `cp -r`, and checkpoints averaged beside `cat` of all of them.

Run by `make bench`, after the conveyor's. Page cache warm for both, turn by turn. `cat` moves bytes
to /dev/null and looks at none of them; the average is computed, and on disk. The speed of its
reading is what it reports of itself, less what the same command reports of a tiny model: numba
loading its compiled kernels. The whole command, interpreter start included, stands below it.
"""

import json
import shutil
import subprocess
from pathlib import Path
from statistics import median

from benchmarks.conveyor import quantize
from benchmarks.harness import (
    LINGCONV,
    Line,
    Words,
    arguments,
    beside_cp,
    run,
    synthetic,
    tell,
    warm,
    workplace,
)
from lingconv.model.family_file import presets

CHECKPOINTS = 8
TINY = Path(__file__).parents[1] / "tests/data/tiny-ling-v2"


def experts(work: Path, rounds: int) -> list[Line]:
    """Measure both ways on a cut of Ling-mini-2.0, and FP8 one way."""
    bf16 = synthetic(work)
    fp8, merged = bf16.made("fp8", quantize), bf16.made("merged", stack)
    lines = [
        *beside_cp("experts stacked, BF16", bf16, stack, rounds),
        *beside_cp("experts split, BF16", merged, split, rounds),
        *beside_cp("experts stacked, FP8", fp8, stack, rounds),
    ]
    for sources in (bf16, fp8, merged):
        sources.remove()
    return lines


def stack(source: Path, out: Path) -> Words:
    """Return the command that stacks experts."""
    return [*LINGCONV, "merge", "experts", source, out]


def split(source: Path, out: Path) -> Words:
    """Return the command that splits what is stacked."""
    return [*stack(source, out), "--split"]


def large(work: Path) -> list[Line]:
    """Measure memory on a MoE layer of Ling-1T: stacks of 8.6 GB, and of 17 GB where fused."""
    config = _config(work / "1t.json", "ling-1t", vocab_size=1024)
    hf, merged = work / "1t", work / "1t-merged"
    run([*LINGCONV, "synth", config, hf, "--layers", "1", "--dense-layers", "0", "--mtp", "0"])
    lines = []
    for names in ("dfactory", "transformers", "automodel"):
        timed = run([*LINGCONV, "merge", "experts", hf, merged, "--experts-as", names])
        shutil.rmtree(merged)
        peak = f"{timed.peak_rss_bytes / 2**20:.0f} MiB"
        what = f"peak RSS, a MoE layer of Ling-1T as {names}"
        lines.append(Line(what, peak, f"25.8 GB in {timed.seconds:.0f} s", bound="1.2 GiB"))
    shutil.rmtree(hf)
    return lines


def average(work: Path, rounds: int) -> list[Line]:
    """Average checkpoints of 1.5 GB: a MoE layer of Ling-mini-2.0 with fewer experts and words."""
    config = _config(work / "cut.json", "ling-mini-2.0", vocab_size=32768, num_experts=192)
    sources = [work / f"s{number}" for number in range(CHECKPOINTS)]
    for seed, source in enumerate(sources):
        shape = ["--layers", "1", "--dense-layers", "0", "--mtp", "0", "--seed", seed]
        run([*LINGCONV, "synth", config, source, *map(str, shape)])
    files = [path for source in sources for path in sorted(source.glob("*.safetensors"))]
    nbytes = sum(path.stat().st_size for path in files)
    out = work / "average"
    command = [*LINGCONV, "merge", "checkpoints", *sources, out, "--mean", "--json"]
    tiny = [shutil.copytree(TINY, work / f"tiny{number}") for number in range(CHECKPOINTS)]
    starting = [*LINGCONV, "merge", "checkpoints", *tiny, work / "started", "--mean", "--json"]
    starts, reading, whole, cats, peak = [], [], [], [], 0
    for number in range(rounds + 1):
        for source in sources:
            warm(source)
        cat = run(["sh", "-c", f"cat {' '.join(map(str, files))} > /dev/null"])
        shutil.rmtree(out, ignore_errors=True)
        timed = run(command)
        shutil.rmtree(out)
        warm(sources[0])
        told, started = seconds_told(command), seconds_told(starting)
        shutil.rmtree(work / "started")
        if number:  # the first round compiles kernels
            starts.append(started)
            reading.append(told - started)
            whole.append(timed.seconds)
            cats.append(cat.seconds)
            peak = max(peak, timed.peak_rss_bytes)
    mine, start_s, command_s, theirs = map(median, (reading, starts, whole, cats))
    two = run([*LINGCONV, "merge", "checkpoints", *sources[:2], work / "two", "--mean"])
    for source in (*sources, *tiny, out, work / "two"):
        shutil.rmtree(source)
    what = f"average of {CHECKPOINTS}, {nbytes / 1e9:.1f} GB read"
    beside = f"cat {nbytes / theirs / 1e9:.1f} GB/s"
    return [
        Line(what, f"{nbytes / mine / 1e9:.1f} GB/s", beside, f"{theirs / mine:.2f}", ">= 0.7"),
        Line("... its start-up", f"{start_s:.2f} s"),
        Line("... its whole command", f"{command_s:.2f} s", f"cat {theirs:.2f} s"),
        Line("... its peak RSS", f"{peak >> 20} MiB", f"of two {two.peak_rss_bytes >> 20} MiB"),
    ]


def seconds_told(command: list[str | Path]) -> float:
    """Run a command; return the seconds that it says it took."""
    words = [str(word) for word in command]
    told = json.loads(subprocess.check_output(words, stderr=subprocess.DEVNULL))
    return float(told["seconds"])


def _config(path: Path, preset: str, **changes: int) -> Path:
    """Write a preset's config with other numbers."""
    path.write_text(json.dumps({**json.loads(presets()[preset].read_text()), **changes}))
    return path


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    with workplace(wanted.work):
        lines = average(wanted.work, wanted.rounds)
        lines += experts(wanted.work, wanted.rounds) + large(wanted.work)
    tell(lines, "merge", wanted)


if __name__ == "__main__":
    main()
