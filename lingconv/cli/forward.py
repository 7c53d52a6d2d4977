"""`lingconv forward`: the reference forward pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lingconv
from lingconv.cli.common_options import DisplayFlags, Formats, Source, SourceFlags
from lingconv.cli.option_groups import grouped
from lingconv.cli.progress_display import make_watcher
from lingconv.cli.terminal import columns, terminal
from lingconv.cli.units import file_size
from lingconv.errors import UsageError
from lingconv.verification.options import Activations, Compute, ForwardOptions

if TYPE_CHECKING:
    from lingconv.verification.reference.forward import Trace
    from lingconv.verification.reference.prompts import NextToken

SCHEMA = "lingconv.forward/1"
FORWARD = "Forward pass"

Prompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="Text to run.", rich_help_panel=FORWARD),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Put the prompt into the chat template.", rich_help_panel=FORWARD),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="IDS|FILE",
        help="Token ids, `1,2,3`, or a file with them (text, JSON, or input_ids in .safetensors).",
        rich_help_panel=FORWARD,
    ),
]
ComputeOption = Annotated[
    Compute,
    typer.Option("--compute", help="Dtype of activations.", rich_help_panel=FORWARD),
]
ActivationsOption = Annotated[
    Activations,
    typer.Option(
        "--activations",
        help="`fp8` rounds the inputs of FP8 weights as serving does.",
        rich_help_panel=FORWARD,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", envvar="LINGCONV_DEVICE", help="`cpu` or `cuda`.", rich_help_panel=FORWARD
    ),
]


@grouped
def forward(
    source: Source,
    prompt: Prompt = None,
    chat: Chat = False,
    tokens: Tokens = None,
    compute: ComputeOption = Compute.F32,
    activations: ActivationsOption = Activations.PLAIN,
    device: Device = "cpu",
    mtp: Annotated[
        bool, typer.Option("--mtp/--no-mtp", help="Run MTP layers too.", rich_help_panel=FORWARD)
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Store logits, hidden states and routing as .safetensors.",
            rich_help_panel=FORWARD,
        ),
    ] = None,
    formats: Formats = None,
    *,
    said: SourceFlags,
    printed: DisplayFlags,
) -> None:
    """Run a checkpoint's forward pass in plain torch, one layer in memory at a time.

    Examples: `lingconv forward Ling-mini-2.0 --prompt "The capital of France is"`,
    `lingconv forward Ling-1T-FP8 --tokens 1,2,3 --activations fp8 -o out.safetensors`
    """
    if out is not None and out.suffix != ".safetensors":
        raise UsageError(f"{out}: results are stored as .safetensors")
    options = ForwardOptions(compute.value, activations.value, device, mtp)
    with make_watcher("forward") as watcher:
        trace = lingconv.api.forward(
            source,
            options,
            prompt=prompt,
            chat=chat,
            tokens=tokens,
            formats=formats,
            given=said.given(),
            watcher=watcher,
        )
    if out is not None:
        trace.save(out)
    show(trace, lingconv.api.next_tokens(source, trace), out)


def show(trace: "Trace", candidates: Sequence["NextToken"], out: Path | None) -> None:
    """Print the likeliest next tokens, and how long it took."""
    num_tokens = trace.tensors["input_ids"].numel()
    lines = [
        f"{num_tokens} tokens, {file_size(trace.bytes_read)} of weights in {trace.seconds:.1f} s,"
        f" {trace.waited_s / trace.seconds:.0%} of it waiting for data",
        "next token:",
        *columns((f"{each.probability:7.2%}", f"{each.id}  {each.text!r}") for each in candidates),
    ]
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "tokens": num_tokens,
        "next_tokens": [candidate._asdict() for candidate in candidates],
        "seconds": round(trace.seconds, 3),
        "waited_seconds": round(trace.waited_s, 3),
        "weight_bytes": trace.bytes_read,
        "output": str(out) if out else None,
    }
    terminal.result(lines, value, str(out or candidates[0].id))
