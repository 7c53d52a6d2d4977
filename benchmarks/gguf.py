"""GGUF against `cp -r` and against llama.cpp: the same weights, the same run, turn by turn.

Run by `make bench`, after the conveyor's. The kernels run beside ggml's own C, from the library in
the xllamacpp wheel, on one thread each; llama-quantize, where it is found on PATH or named with
`--llama-quantize`, turns the BF16 file that lingconv wrote into Q4_K_M, which is the second half of
llama.cpp's way. What is not there is skipped with a word.
"""

import ctypes
import hashlib
import importlib.util
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

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
from lingconv.encodings.dtypes import GgmlType
from lingconv.encodings.kernels.ggml_encode import QUANTIZERS

_WEIGHTS = 1 << 20
_CHUNK_BYTES = 4 << 20
# How many times as fast as ggml they are to be.
_BOUNDS = {"Q2_K": 6, "Q3_K": 6, "Q4_K": 6, "Q5_K": 6, "Q6_K": 6, "IQ4_XS": 4}


def conversions(work: Path, rounds: int, llama_quantize: str | None) -> list[Line]:
    """Measure the jobs on a cut of Ling-mini-2.0."""
    sources = synthetic(work)
    lines = []
    for outtype in ("bf16", "q8_0"):

        def command(source: Path, out: Path, outtype: str = outtype) -> Words:
            return [*LINGCONV, "convert", source, out / "x.gguf", "--outtype", outtype]

        lines += beside_cp(f"HF -> GGUF {outtype}", sources, command, rounds)
    return lines + k_quants(sources.large, work, rounds, llama_quantize)


def k_quants(source: Path, work: Path, rounds: int, llama_quantize: str | None) -> list[Line]:
    """Measure HF -> Q4_K_M, beside llama-quantize from a BF16 file of the same weights."""
    base, ours, theirs = work / "base.gguf", work / "ours.gguf", work / "theirs.gguf"
    run([*LINGCONV, "convert", source, base, "--outtype", "bf16"])
    own_runs, other_runs = [], []
    for _ in range(min(rounds, 3)):
        warm(source)
        own_runs.append(run([*LINGCONV, "convert", source, ours, "--outtype", "q4_k_m", "--fresh"]))
        if llama_quantize:
            other_runs.append(run([llama_quantize, base, theirs, "Q4_K_M", "2"]))
    mine = statistics.median(each.seconds for each in own_runs)
    line = Line("HF -> GGUF q4_k_m", f"{mine:.1f} s", "no llama-quantize here")
    if llama_quantize:
        other = statistics.median(each.seconds for each in other_runs)
        same = "the same bytes" if tensor_digest(ours) == tensor_digest(theirs) else "OTHER BYTES"
        line = Line(
            f"HF -> GGUF q4_k_m, {same}",
            f"{mine:.1f} s",
            f"llama-quantize {other:.1f} s",
            f"{other / mine:.1f} x as fast",
            "5",
        )
    peak = max(each.peak_rss_bytes for each in own_runs) / 2**20
    return [line, Line("... its peak RSS", f"{peak:.0f} MiB", bound="1.2 GiB")]


def tensor_digest(path: Path) -> str:
    """Return a digest of all tensors by name: two tools order them in different ways.

    The data is read, not mapped: what this process holds counts as memory of those it starts.
    """
    import gguf

    found = {}
    with path.open("rb") as file:
        for tensor in gguf.GGUFReader(path).tensors:
            sha = hashlib.sha256()
            file.seek(tensor.data_offset)
            for start in range(0, tensor.n_bytes, _CHUNK_BYTES):
                sha.update(file.read(min(_CHUNK_BYTES, tensor.n_bytes - start)))
            found[tensor.name] = sha.hexdigest()
    return hashlib.sha256(str(sorted(found.items())).encode()).hexdigest()


def large(work: Path) -> list[Line]:
    """Measure memory on one dense and one MoE layer of Ling-1T: stacks of 8.6 GB each."""
    source = work / "ling-1t-cut"
    run([*LINGCONV, "synth", "ling-1t", source, "--layers", "2", "--dense-layers", "1"])
    done = run([*LINGCONV, "convert", source, work / "large.gguf", "--outtype", "q8_0"])
    shutil.rmtree(source)
    peak = f"{done.peak_rss_bytes / 2**20:.0f} MiB"
    return [Line("peak RSS, 2 layers of Ling-1T to q8_0", peak, bound="1.2 GiB")]


def kernels(rounds: int) -> list[Line]:
    """Measure each quantizer beside ggml's, on normal weights rounded to BF16."""
    weights = np.random.default_rng(0).standard_normal(_WEIGHTS).astype(np.float32) * 0.02
    weights = (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    theirs = ggml_library()
    if theirs is None:
        return [Line("kernels", "", "no xllamacpp here, so no ggml to run beside")]
    lines = []
    for kind, quantize in QUANTIZERS.items():
        blocks = weights.reshape(-1, kind.elements)
        out = np.empty((len(blocks), kind.nbytes), np.uint8)
        other = np.empty_like(out)
        own_rate, other_rate = rates(
            lambda q=quantize, b=blocks, o=out: q(b, o),
            lambda k=kind, o=other: theirs(k, weights, o),
            rounds,
        )
        assert np.array_equal(out, other)  # noqa: S101
        lines.append(
            Line(
                f"{kind} kernel",
                f"{own_rate:.0f} M/s",
                f"ggml {other_rate:.0f} M/s",
                f"{own_rate / other_rate:.1f} x as fast",
                str(_BOUNDS.get(kind, "")),
            )
        )
    return lines


def rates(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Return million weights per second of both, turn by turn; the first round compiles."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for times, work in zip(seconds, (ours, theirs), strict=True):
            started = time.perf_counter()
            work()
            if number:
                times.append(time.perf_counter() - started)
    own, other = (_WEIGHTS / statistics.median(times) / 1e6 for times in seconds)
    return own, other


def ggml_library() -> Callable[[GgmlType, np.ndarray, np.ndarray], None] | None:
    """Return ggml's own quantization of rows, from the xllamacpp wheel, or None without it."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        return None
    binary = next(Path(found.origin).parent.glob("*.so"))
    quantize = ctypes.CDLL(str(binary)).ggml_quantize_chunk
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]

    def call(kind: GgmlType, weights: np.ndarray, out: np.ndarray) -> None:
        quantize(kind.id, weights.ctypes.data, out.ctypes.data, 0, _WEIGHTS // 4096, 4096, None)

    return call


def main() -> None:
    """Measure, print, publish."""
    parser = arguments(__doc__)
    parser.add_argument("--llama-quantize", default=shutil.which("llama-quantize"))
    wanted = parser.parse_args()
    with workplace(wanted.work):
        lines = conversions(wanted.work, wanted.rounds, wanted.llama_quantize)
        lines += large(wanted.work)
        lines += kernels(wanted.rounds)
    tell(lines, "gguf", wanted)


if __name__ == "__main__":
    main()
