"""torch_dist against `cp -r`: HF -> Megatron and back, turn by turn.

Run by `make bench`, after the conveyor's.
"""

import shutil
from pathlib import Path

from benchmarks.harness import (
    LINGCONV,
    Line,
    Words,
    arguments,
    beside_cp,
    run,
    synthetic,
    tell,
    workplace,
)


def conversions(work: Path, rounds: int) -> list[Line]:
    """Measure both ways on a cut of Ling-mini-2.0."""
    hf = synthetic(work)
    megatron = hf.made("torch_dist", there)
    lines = [
        *beside_cp("HF -> torch_dist", hf, there, rounds),
        *beside_cp("torch_dist -> HF", megatron, back, rounds),
    ]
    hf.remove()
    megatron.remove()
    return lines


def there(source: Path, out: Path) -> Words:
    """Return the command for Hugging Face to torch_dist."""
    return [*LINGCONV, "convert", source, out, "--to", "megatron"]


def back(source: Path, out: Path) -> Words:
    """Return the command for torch_dist to Hugging Face."""
    return [*LINGCONV, "convert", source, out]


def large(work: Path) -> list[Line]:
    """Measure memory on one dense and one MoE layer of Ling-1T: a stack of 17 GB."""
    hf, megatron = work / "ling-1t-cut", work / "ling-1t-dist"
    run([*LINGCONV, "synth", "ling-1t", hf, "--layers", "2", "--dense-layers", "1"])
    written = run(there(hf, megatron))
    shutil.rmtree(hf)
    read = run(back(megatron, hf))
    shutil.rmtree(megatron)
    shutil.rmtree(hf)
    return [
        Line(f"peak RSS, 2 layers of Ling-1T {way}", f"{each.peak_rss_bytes / 2**20:.0f} MiB",
             bound="1.2 GiB")
        for way, each in (("to torch_dist", written), ("and back", read))
    ]  # fmt: skip


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    with workplace(wanted.work):
        lines = conversions(wanted.work, wanted.rounds) + large(wanted.work)
    tell(lines, "megatron", wanted)


if __name__ == "__main__":
    main()
