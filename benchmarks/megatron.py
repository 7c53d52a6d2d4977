"""torch_dist against `cp -r`: HF -> Megatron and back, turn by turn.

Run by `make bench`, after the conveyor's.
"""

import shutil
from pathlib import Path

from benchmarks.conveyor import (
    LINGCONV,
    Line,
    arguments,
    compare,
    run,
    side_by_side,
    tell,
    workplace,
)


def conversions(work: Path, rounds: int) -> list[Line]:
    """Measure both ways on a cut of Ling-mini-2.0."""
    hf, megatron = work / "bf16", work / "torch_dist"
    run([*LINGCONV, "synth", "ling-mini-2.0", hf, "--layers", "4"])
    run([*LINGCONV, "convert", hf, megatron, "--to", "megatron"])

    def there(out: Path) -> list[str | Path]:
        return [*LINGCONV, "convert", hf, out, "--to", "megatron"]

    def back(out: Path) -> list[str | Path]:
        return [*LINGCONV, "convert", megatron, out]

    lines = [
        *compare("HF -> torch_dist", *side_by_side(hf, hf, work, there, rounds)),
        *compare("torch_dist -> HF", *side_by_side(megatron, megatron, work, back, rounds)),
    ]
    for folder in (hf, megatron):
        shutil.rmtree(folder)
    return lines


def large(work: Path) -> list[Line]:
    """Measure memory on one dense and one MoE layer of Ling-1T: a stack of 17 GB."""
    hf, megatron = work / "ling-1t-cut", work / "ling-1t-dist"
    run([*LINGCONV, "synth", "ling-1t", hf, "--layers", "2", "--dense-layers", "1"])
    there = run([*LINGCONV, "convert", hf, megatron, "--to", "megatron"])
    shutil.rmtree(hf)
    back = run([*LINGCONV, "convert", megatron, hf])
    shutil.rmtree(megatron)
    shutil.rmtree(hf)
    return [
        Line(f"peak RSS, 2 layers of Ling-1T {way}", f"{each.peak_rss_bytes / 2**20:.0f} MiB",
             bound="1.2 GiB")
        for way, each in (("to torch_dist", there), ("and back", back))
    ]  # fmt: skip


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    with workplace(wanted.work):
        lines = conversions(wanted.work, wanted.rounds) + large(wanted.work)
    tell(lines, "megatron", wanted)


if __name__ == "__main__":
    main()
