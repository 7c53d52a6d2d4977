"""The proof against `cat`: verify reads both checkpoints, `cat` sends the same files to /dev/null.

Run by `make bench`, after the conveyor's. Page cache warm for both, turn by turn. `cat` moves bytes
and looks at none of them; verify decodes, compares and judges every number. Its whole command is
timed, interpreter start included, and the reading alone, as it reports it.
"""

import json
import shutil
import subprocess
from pathlib import Path

from benchmarks.harness import LINGCONV, Line, arguments, run, tell, warm, workplace


def tensors(work: Path, rounds: int) -> list[Line]:
    """Compare a BF16 / FP8 pair of a cut of Ling-mini-2.0, 10 GB together."""
    bf16, fp8 = work / "bf16", work / "fp8"
    run([*LINGCONV, "synth", "ling-mini-2.0", bf16, "--layers", "4"])
    run([*LINGCONV, "quantize", bf16, fp8])
    command = [*LINGCONV, "verify", bf16, fp8, "--level", "tensors", "--json"]
    ours, reading, cats, peak = [], [], [], 0
    for number in range(rounds + 1):
        warm(bf16)
        warm(fp8)
        cat = run(["sh", "-c", f"cat {bf16}/*.safetensors {fp8}/*.safetensors > /dev/null"])
        timed = run(command)
        verdict = json.loads(subprocess.check_output([str(word) for word in command]))
        if number:  # the first round compiles kernels
            ours.append(timed.seconds)
            cats.append(cat.seconds)
            reading.append(verdict["seconds"])
            peak = max(peak, timed.peak_rss_bytes)
    nbytes = verdict["bytes_read"]
    mine, theirs, whole = (sorted(each)[len(each) // 2] for each in (reading, cats, ours))
    rate = f"{nbytes / mine / 1e9:.1f} GB/s"
    beside = f"cat {nbytes / theirs / 1e9:.1f} GB/s"
    return [
        Line("verify --level tensors, BF16 / FP8", rate, beside, f"{theirs / mine:.2f}", ">= 0.5"),
        Line("... its whole command, 10 GB", f"{whole:.2f} s", f"cat {theirs:.2f} s"),
        Line("... its peak RSS", f"{peak >> 20} MiB"),
    ]


def forward(work: Path) -> list[Line]:
    """Run 64 tokens through a dense and a MoE layer of Ling-1T's dimensions."""
    source = work / "1t"
    shape = ["--layers", "2", "--dense-layers", "1", "--mtp", "0"]
    run([*LINGCONV, "synth", "ling-1t", source, *shape])
    command = [*LINGCONV, "forward", source, "--json"]
    timed = run(command)
    trace = json.loads(subprocess.check_output([str(word) for word in command]))
    shutil.rmtree(source)
    rate = trace["weight_bytes"] / trace["seconds"] / 1e9
    return [
        Line("forward, 64 tokens, 2 layers of Ling-1T", f"{trace['seconds']:.1f} s",
             f"{trace['weight_bytes'] / 1e9:.1f} GB, {rate:.1f} GB/s"),
        Line("... waiting for data", f"{trace['waited_seconds'] / trace['seconds']:.0%}"),
        Line("... its peak RSS", f"{timed.peak_rss_bytes >> 20} MiB", bound="4 GiB"),
    ]  # fmt: skip


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    with workplace(wanted.work):
        lines = [*tensors(wanted.work, wanted.rounds), *forward(wanted.work)]
    tell(lines, "proof", wanted)


if __name__ == "__main__":
    main()
