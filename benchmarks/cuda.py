"""A GPU beside its own copies, and a conversion on it beside the same one on the processors.

    python -m benchmarks.cuda [--work FOLDER]

Needs a CUDA device and 75 GB in FOLDER, best in memory (/dev/shm), so that no disk is in the way.
The kernels run on 268 million weights that are in the GPU's memory; their speed is bytes read and
written, beside a copy from and to that memory. The conversions are of 16 layers of Ling-mini-2.0;
what bounds them on a GPU is PCIe, measured in the same run.
"""

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import LINGCONV, Line, arguments, machine, run, tell, workplace

_ROWS, _COLS = 32768, 8192
_BLOCK = 128, 128
_PCIE_BYTES = 256 << 20
_SHARDS = ["--max-shard-size", "500MB"]  # more files than workers, as large models have


def kernels() -> list[Line]:
    """Measure the kernels beside a copy within the GPU's memory."""
    from triton.testing import do_bench  # where there is no GPU, there is no Triton either

    from lingconv.encodings.kernels import fp8_encode as fp8
    from lingconv.encodings.kernels import fp8_triton as cuda

    weights = (torch.randn(_ROWS, _COLS, device="cuda") * 0.02).bfloat16()
    wide = weights.float()
    again, wide_again = torch.empty_like(weights), torch.empty_like(wide)
    codes = torch.empty(_ROWS, _COLS, dtype=torch.uint8, device="cuda")
    scales = torch.empty(_ROWS // _BLOCK[0], _COLS // _BLOCK[1], device="cuda")
    columns = torch.empty(_ROWS, 1, device="cuda")
    odd = torch.zeros(1, dtype=torch.int32, device="cuda")
    count, channel = weights.numel(), (1, _COLS)

    def speed(work: Callable[[], object], element_bytes: int) -> float:
        milliseconds = do_bench(work, warmup=50, rep=200, return_mode="median")
        return count * element_bytes / milliseconds / 1e6

    def quantize(source: torch.Tensor, into: torch.Tensor, block: tuple[int, int]) -> None:
        cuda.quantize(source, codes, into, odd, block, 0.0, fp8.SCALE_F32)

    def dequantize(grid: torch.Tensor, into: torch.Tensor, block: tuple[int, int]) -> None:
        cuda.dequantize(codes, grid, into, odd, block, 0)

    copy = speed(lambda: again.copy_(weights), 4)
    jobs: list[tuple[str, Callable[[], object], int]] = [
        ("BF16 -> FP8 block", lambda: quantize(weights, scales, _BLOCK), 3),
        ("F32 -> FP8 block", lambda: quantize(wide, scales, _BLOCK), 5),
        ("BF16 -> FP8 channel", lambda: quantize(weights, columns, channel), 3),
        ("FP8 channel -> BF16", lambda: dequantize(columns, again, channel), 3),
        ("FP8 block -> BF16", lambda: dequantize(scales, again, _BLOCK), 3),
        ("FP8 block -> F32", lambda: dequantize(scales, wide_again, _BLOCK), 5),
        ("F32 -> BF16", lambda: cuda.convert(wide, again, odd), 6),
    ]
    lines = []
    for name, work, element_bytes in jobs:
        if name == "FP8 block -> BF16":
            quantize(weights, scales, _BLOCK)
        found = speed(work, element_bytes)
        theirs = f"copy {copy:.0f} GB/s"
        lines.append(Line(name, f"{found:.0f} GB/s", theirs, f"{found / copy:.2f}", ">= 0.8"))
    if odd.item():
        raise RuntimeError("a kernel met what is not finite")
    return lines


def pcie() -> tuple[float, float, float]:
    """Return bytes a second up, down, and each way when both are busy."""
    ups = [torch.empty(_PCIE_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2)]
    there = [torch.empty(_PCIE_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def timed(up: bool, down: bool) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(20):
            if up:
                with torch.cuda.stream(streams[0]):
                    there[0].copy_(ups[0], non_blocking=True)
            if down:
                with torch.cuda.stream(streams[1]):
                    ups[1].copy_(there[1], non_blocking=True)
        torch.cuda.synchronize()
        return 20 * _PCIE_BYTES / (time.perf_counter() - started)

    timed(up=True, down=True)
    return timed(up=True, down=False), timed(up=False, down=True), timed(up=True, down=True)


def conversions(work: Path, rounds: int) -> list[Line]:
    """Measure whole commands on the GPU and on the processors, turn by turn."""
    up, down, each = pcie()
    lines = [
        Line("PCIe, up / down", f"{up / 1e9:.1f} / {down / 1e9:.1f} GB/s"),
        Line("PCIe, each way when both are busy", f"{each / 1e9:.1f} GB/s"),
    ]
    source, quantized, out = work / "bf16", work / "fp8", work / "out"
    run([*LINGCONV, "synth", "ling-mini-2.0", source, "--layers", "16", *_SHARDS])
    run([*LINGCONV, "quantize", source, quantized, *_SHARDS])
    read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    written = sum(path.stat().st_size for path in quantized.glob("*.safetensors"))
    for job, command, bytes_up, bytes_down in (
        ("BF16 -> FP8 block", ["quantize", source, out, *_SHARDS], read, written),
        (
            "FP8 block -> BF16",
            ["convert", quantized, out, "--dtype", "bf16", *_SHARDS],
            written,
            read,
        ),
    ):
        seconds: dict[str, list[tuple[float, float]]] = {"cuda": [], "cpu": []}
        for _ in range(rounds):
            for device, times in seconds.items():
                shutil.rmtree(out, ignore_errors=True)
                started = time.monotonic()
                done = subprocess.run(
                    [*LINGCONV, *map(str, command), "--device", device, "--json"],
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                whole = time.monotonic() - started
                times.append((json.loads(done.stdout)["seconds"], whole))
        (gpu, gpu_whole), (cpu, cpu_whole) = (
            (statistics.median(t[0] for t in times), statistics.median(t[1] for t in times))
            for times in (seconds["cuda"], seconds["cpu"])
        )
        limit = max(bytes_up / up, bytes_down / down, min(bytes_up, bytes_down) / each)
        lines += [
            Line(f"{job}, {bytes_up / 1e9:.1f} GB", f"{gpu:.2f} s", f"processors {cpu:.2f} s",
                 f"{gpu / cpu:.2f}"),
            Line("... what PCIe alone takes", "", f"{limit:.2f} s", f"{gpu / limit:.2f}"),
            Line("... the whole command", f"{gpu_whole:.2f} s", f"processors {cpu_whole:.2f} s",
                 f"{gpu_whole / cpu_whole:.2f}"),
        ]  # fmt: skip
    return lines


def main() -> None:
    """Measure, print, publish."""
    wanted = arguments(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device here")
        return
    with workplace(wanted.work):
        lines = [*kernels(), *conversions(wanted.work, wanted.rounds)]
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {machine()}"
    tell(lines, "cuda", wanted, where)


if __name__ == "__main__":
    main()
