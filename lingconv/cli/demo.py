"""The main job on a tiny Ling model, with what a person wants to see of it.

Run by `make demo`: makes a model, quantizes it to FP8, converts it back, measures with the real
safetensors library and torch, not with lingconv's own reader, what that did to the weights, and has
`verify` prove both steps.
"""

import math
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

import lingconv
from lingconv.api import write_report
from lingconv.cli import verify
from lingconv.cli.units import file_size

OUT = Path("demo-out")


@dataclass(slots=True)
class Damage:
    """Sums over the tensors of one kind."""

    tensors: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    signal: float = 0.0
    noise: float = 0.0
    worst: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor, stored_bytes: int) -> None:
        """Count one tensor by its values before and after the round trip."""
        difference = before.double() - after.double()
        self.tensors += 1
        self.bytes_before += before.nbytes
        self.bytes_after += stored_bytes
        self.signal += before.double().square().sum().item()
        self.noise += difference.square().sum().item()
        self.worst = max(self.worst, difference.abs().max().item())

    @property
    def snr(self) -> str:
        """Signal to noise, in decibels."""
        return f"{10 * math.log10(self.signal / self.noise):.1f} dB" if self.noise else "exact"


def main() -> None:
    """Make, quantize, convert back, compare, and show."""
    console = Console()
    shutil.rmtree(OUT, ignore_errors=True)
    source, fp8, back = OUT / "tiny-bf16", OUT / "tiny-fp8", OUT / "tiny-bf16-again"
    console.print("[bold]1.[/] a tiny Ling 2.0: lingconv synth tiny", source)
    lingconv.synth("tiny", source, lingconv.ConvertOptions(max_shard_bytes=2_000_000), mtp=1)
    report = lingconv.inspect(source)
    console.print(
        f"   {report.family}: {report.layers} layers + {report.mtp_layers} MTP,"
        f" {report.experts} experts, {report.tensors} tensors, {file_size(report.tensor_bytes)}"
    )
    console.print("[bold]2.[/] to FP8: lingconv quantize", source, fp8, "--fp8")
    lingconv.quantize(source, fp8)
    after = lingconv.inspect(fp8)
    console.print(
        "   "
        + ", ".join(f"{number} x {label}" for label, number in after.encodings.items())
        + f": {file_size(after.tensor_bytes)}, nothing odd: {not after.faults}"
    )
    console.print("[bold]3.[/] and back: lingconv convert", fp8, back, "--dtype bf16")
    lingconv.convert(fp8, back, lingconv.ConvertOptions(dtype="bf16"))
    console.print("[bold]4.[/] what it did to the weights, read with safetensors and torch:\n")
    console.print(_table(_compare(source, fp8, back)))
    console.print("[bold]5.[/] the proof: lingconv verify, with both models run side by side\n")
    for one, other in ((source, fp8), (fp8, back)):
        verdict = lingconv.verify(one, other)
        for line in verify.lines(verdict, verbose=False):
            console.print(f"   {line}", highlight=False, soft_wrap=True)
        page = OUT / f"{other.name}.html"
        write_report(verdict, page)
        console.print(f"   a report to look at: {page}\n")
    gguf = OUT / "tiny-Q4_K_M.gguf"
    console.print("[bold]6.[/] for llama.cpp: lingconv convert", fp8, gguf, "--outtype q4_k_m")
    q4_k_m = lingconv.GgufOptions(outtype="q4_k_m")
    lingconv.convert(fp8, gguf, lingconv.ConvertOptions(layout="gguf", gguf=q4_k_m))
    found = lingconv.inspect(gguf)
    types = ", ".join(f"{number} x {label}" for label, number in found.encodings.items())
    console.print(f"   {types}: {file_size(found.file_bytes)}\n")
    console.print(f"All of it is in {OUT}/. Next: lingconv --help, README.md")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def _compare(source: Path, fp8: Path, back: Path) -> dict[str, Damage]:
    before, stored, after = _tensors(source), _tensors(fp8), _tensors(back)
    if before.keys() != after.keys():
        raise RuntimeError("the round trip lost or invented tensors")
    kinds: dict[str, Damage] = defaultdict(Damage)
    for name, values in before.items():
        parts = [stored[name], stored.get(name + "_scale_inv")]
        stored_bytes = sum(part.nbytes for part in parts if part is not None)
        kinds[_kind(name)].add(values, after[name], stored_bytes)
    return kinds


def _kind(name: str) -> str:
    for mark, kind in (
        ("mlp.experts", "experts"),
        ("shared_experts", "shared experts"),
        ("mlp.gate.", "router"),
        ("norm", "norms"),
        ("attention", "attention"),
        ("mlp", "dense feed-forward"),
        ("eh_proj", "MTP projection"),
    ):
        if mark in name:
            return kind
    return "embedding and head"


def _table(kinds: dict[str, Damage]) -> Table:
    table = Table(title="BF16 -> FP8 (128x128 blocks) -> BF16", title_justify="left", box=SIMPLE)
    table.add_column("kind", no_wrap=True)
    for heading in ("tensors", "BF16", "FP8", "SNR", "worst error"):
        table.add_column(heading, justify="right")
    for kind, damage in sorted(kinds.items(), key=lambda item: -item[1].bytes_before):
        table.add_row(
            kind,
            str(damage.tensors),
            file_size(damage.bytes_before),
            file_size(damage.bytes_after),
            damage.snr,
            f"{damage.worst:.2e}" if damage.worst else "0",
        )
    return table


if __name__ == "__main__":
    main()
