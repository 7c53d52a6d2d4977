"""`lingconv push`: a finished folder into a repository."""

from pathlib import Path
from typing import Annotated

import typer

import lingconv
from lingconv.cli.common_options import HUB, DisplayFlags, PublishFlags
from lingconv.cli.option_groups import grouped
from lingconv.cli.progress_display import make_progress
from lingconv.cli.terminal import terminal
from lingconv.cli.units import file_size

SCHEMA = "lingconv.push/1"


@grouped
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="DST", help="hf://org/name[@branch]")],
    publish: PublishFlags,
    *,
    verdict: Annotated[
        Path | None,
        typer.Option(
            "--verdict",
            metavar="FILE",
            help="What `verify --json` printed, for a table in the card.",
            rich_help_panel=HUB,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE", help="The report of `verify`.", rich_help_panel=HUB
        ),
    ] = None,
    printed: DisplayFlags,
) -> None:
    """Publish a folder: weights first, then index, config and card in one commit.

    The same command resumes: what the Hub has is not sent again. At the end the Hub's listing is
    compared with every file.

    Example: `lingconv push Ling-mini-2.0-FP8 hf://me/Ling-mini-2.0-FP8 --create`
    """
    with make_progress() as progress:
        pushed = lingconv.api.push(
            folder,
            repository,
            publish.options,
            verdict=verdict,
            report=report,
            progress=progress,
        )
    found = f", {pushed.files_found} were there" if pushed.files_found else ""
    line = (
        f"{pushed.commit.address}: {pushed.files_sent} weight files,"
        f" {file_size(pushed.bytes_sent)} sent in {pushed.seconds:.1f} s{found}; all compared"
    )
    value = {
        "schema": SCHEMA,
        "destination": pushed.commit.address,
        "commit_url": pushed.commit.url,
        "files_sent": pushed.files_sent,
        "bytes_sent": pushed.bytes_sent,
        "files_found": pushed.files_found,
        "seconds": round(pushed.seconds, 3),
    }
    terminal.result([line, pushed.commit.url], value, pushed.commit.url)
    terminal.note(f"hint: lingconv verify SRC {pushed.commit.address}")
