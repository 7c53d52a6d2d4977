"""lingconv beside what a user would take instead: the same job, the same run, turn by turn.

    python -m benchmarks.peers [--peers FOLDER] [--llama-cpp FOLDER]

Run by `make bench`. `make peers` gives each tool an environment of its own in FOLDER; llama.cpp is
a checkout with build/bin/llama-quantize in it. What is not there is skipped with a word. Page cache
warm for all; ours are whole commands, durable when they end, theirs end as they end.
"""

import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import LINGCONV, ROOT, Line, Run, arguments, run, tell, warm, workplace

Command = Callable[[Path], list[str | Path]]
_CHECKPOINTS = 4
_drawn: dict[str, dict[str, float]] = {}

# Marked like the layers that lingconv leaves as they are: embeddings, head, router, norms.
_MODEL_FREE_PTQ = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(
    sys.argv[1], sys.argv[2], scheme="FP8_BLOCK", max_workers=2, device="cpu",
    ignore=["lm_head", "re:.*word_embeddings", "re:.*mlp.gate$", "re:.*norm$", "re:.*eh_proj"],
)
"""


def beside(
    job: str, sources: list[Path], ours: Command, peers: dict[str, Command], work: Path, rounds: int
) -> list[Line]:
    """Run a job our way and theirs, turn by turn; return a line for each of theirs."""
    out = work / "out"
    runs: dict[str, list[Run]] = {name: [] for name in ("lingconv", *peers)}
    for _ in range(rounds):
        for name, command in {"lingconv": ours, **peers}.items():
            for path in work.glob("out*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for source in sources:
                warm(source)
            runs[name].append(run(command(out)))
    _drawn[job] = {name: statistics.median(r.seconds for r in each) for name, each in runs.items()}
    return [_line(job, name, runs["lingconv"], runs[name]) for name in peers]


def _line(job: str, name: str, ours: list[Run], theirs: list[Run]) -> Line:
    mine, other = (statistics.median(each.seconds for each in runs) for runs in (ours, theirs))
    own_peak, peak = (max(each.peak_rss_bytes for each in runs) / 2**20 for runs in (ours, theirs))
    return Line(
        job,
        f"{mine:.2f} s, {own_peak:.0f} MiB",
        f"{name} {other:.2f} s, {peak:,.0f} MiB",
        f"{other / mine:.1f} x as fast",
    )


def quantizing(work: Path, rounds: int, peers: Path) -> list[Line]:
    """BF16 to FP8 with block scales: a cut of Ling-mini-2.0, 6.3 GB in 5 shards."""
    job, source = "BF16 -> FP8 block, 6.3 GB", work / "bf16"
    run(_synth(source, "4", "1.4GB"))
    commands: dict[str, Command] = {
        "cp -r": lambda out: ["cp", "-r", source, out],
        "the usual torch script": lambda out: [
            sys.executable, "-m", "benchmarks.usual_torch", source, out,
        ],
    }  # fmt: skip
    python = peers / "llm-compressor" / "bin" / "python"
    if python.exists():
        commands["llm-compressor model_free_ptq"] = lambda out: [
            python, "-c", _MODEL_FREE_PTQ, source, out,
        ]  # fmt: skip
    lines = beside(
        job,
        [source],
        lambda out: [*LINGCONV, "quantize", source, out, "--fp8"],
        commands,
        work,
        rounds,
    )
    if not python.exists():
        lines.append(Line(job, "", "no llm-compressor here (`make peers`)"))
    return lines


def averaging(work: Path, rounds: int, peers: Path) -> list[Line]:
    """Average checkpoints of one layer each."""
    job = f"average of {_CHECKPOINTS} checkpoints"
    tool = peers / "mergekit" / "bin" / "mergekit-pytorch"
    if not tool.exists():
        return [Line(job, "", "no mergekit here (`make peers`)")]
    sources = [work / f"step-{number}" for number in range(_CHECKPOINTS)]
    for seed, source in enumerate(sources):
        run([*_synth(source, "1", "100GB"), "--dense-layers", "0", "--seed", str(seed)])
    nbytes = sum(path.stat().st_size for path in sources[0].glob("*.safetensors"))
    recipe = work / "linear.yml"
    models = "".join(
        f"  - model: {next(source.glob('*.safetensors'))}\n    parameters:\n      weight: 1.0\n"
        for source in sources
    )
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}dtype: bfloat16\n")
    return beside(
        f"{job} of {nbytes / 1e9:.1f} GB",
        sources,
        lambda out: [*LINGCONV, "merge", "checkpoints", *sources, out, "--mean"],
        {"mergekit": lambda out: [tool, recipe, out, "--quiet", "--lazy-unpickle"]},
        work,
        rounds,
    )


def k_quants(work: Path, rounds: int, llama_cpp: Path | None) -> list[Line]:
    """Hugging Face to Q4_K_M, which takes llama.cpp two commands and a file in between."""
    job, source = "HF -> GGUF q4_k_m, 6.3 GB", work / "bf16"
    if llama_cpp is None:
        return [Line(job, "", "no llama.cpp here (`--llama-cpp FOLDER`)")]
    convert = f"{sys.executable} {ROOT}/benchmarks/llama_convert.py {llama_cpp}"
    quantize = f"{llama_cpp}/build/bin/llama-quantize"
    run(_synth(source, "4", "1.4GB"))
    return beside(
        job,
        [source],
        lambda out: [*LINGCONV, "convert", source, f"{out}.gguf", "--outtype", "q4_k_m"],
        {
            "llama.cpp": lambda out: [
                "sh", "-ec",
                f"{convert} {source} {out}-base.gguf;"
                f" {quantize} {out}-base.gguf {out}.gguf Q4_K_M 2",
            ]
        },
        work,
        min(rounds, 1),
    )  # fmt: skip


def draw(runs: dict[str, dict[str, float]], path: Path) -> None:
    """Draw how long everybody took, job by job."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lingconv"  # the same figures, the same file
    from matplotlib import pyplot as plt

    heights = [len(times) for times in runs.values()]
    figure, axes = plt.subplots(
        len(runs), figsize=(7, 0.42 * sum(heights) + 0.9 * len(runs)), height_ratios=heights,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (job, times) in zip(axes[:, 0], runs.items(), strict=True):
        names = [*reversed(times)]
        colours = ["#2f6fdb" if name == "lingconv" else "#b8bec8" for name in names]
        bars = axis.barh(names, [times[name] for name in names], color=colours)
        axis.bar_label(bars, fmt="%.1f s", padding=3)
        axis.set_title(job, loc="left", fontsize=10)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
        axis.margins(x=0.12)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _synth(target: Path, layers: str, shard: str) -> list[str | Path]:
    preset = [*LINGCONV, "synth", "ling-mini-2.0", target]
    return [*preset, "--layers", layers, "--max-shard-size", shard]


def main() -> None:
    """Measure, print, publish."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers")
    parser.add_argument("--llama-cpp", type=Path)
    wanted = parser.parse_args()
    lines: list[Line] = []
    jobs = (
        lambda work: quantizing(work, wanted.rounds, wanted.peers),
        lambda work: averaging(work, wanted.rounds, wanted.peers),
        lambda work: k_quants(work, wanted.rounds, wanted.llama_cpp),
    )
    for measure in jobs:
        with workplace(wanted.work) as work:
            lines += measure(work)
    tell(lines, "peers", wanted)
    if not wanted.no_publish:
        draw(_drawn, ROOT / "docs" / "peers.svg")


if __name__ == "__main__":
    main()
