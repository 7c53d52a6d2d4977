"""The forward pass on a GPU: Ling-mini-2.0 at its full depth, synthesised on the spot.

    python -m benchmarks.forward_gpu [FOLDER]

Needs a CUDA device and about 50 GB of disk. Prints the time of each pass and the share of it that
was spent waiting for weights; the first pass reads from disk or cache as it comes, the others from
the page cache.
"""

import sys
from pathlib import Path

import torch

import lingconv
from lingconv import ForwardOptions, VerifyOptions


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".bench")
    bf16, fp8 = folder / "ling-mini-2.0", folder / "ling-mini-2.0-fp8"
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for result in (lingconv.synth("ling-mini-2.0", bf16), lingconv.quantize(bf16, fp8)):
        print(f"{result.destination}: {result.bytes_written / 1e9:.1f} GB, {result.seconds:.1f} s")
    for source, compute, activations in (
        (bf16, "f32", "plain"),
        (bf16, "f32", "plain"),
        (bf16, "bf16", "plain"),
        (fp8, "f32", "plain"),
        (fp8, "f32", "fp8"),
    ):
        options = ForwardOptions(compute, activations, "cuda")
        trace = lingconv.forward(source, options)
        print(
            f"{source.name:18} {compute:4} activations {activations:5}"
            f" {trace.bytes_read / 1e9:5.1f} GB {trace.seconds:6.2f} s"
            f" {trace.bytes_read / trace.seconds / 1e9:5.2f} GB/s,"
            f" {trace.waited_s / trace.seconds:4.0%} waiting for data",
            flush=True,
        )
    for pinned in (False, True):
        options = VerifyOptions(forward=ForwardOptions(device="cuda"), pin_routing=pinned)
        verdict = lingconv.verify(bf16, fp8, options)
        cosines = [round(layer.mean_cosine, 4) for layer in verdict.forward.layers]
        print(f"verify, pinned {pinned}: {verdict.ok}, {verdict.seconds:.1f} s; cosines {cosines}")
        print(f"  mean KLD {verdict.forward.logits.mean_kld:.5f}", *verdict.findings[:3])


if __name__ == "__main__":
    main()
