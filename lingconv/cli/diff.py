"""`lingconv diff`: what differs between two checkpoints, as they are stored."""

from collections import Counter
from typing import Annotated

import typer

import lingconv
from lingconv.cli.common_options import DisplayFlags, Jobs
from lingconv.cli.option_groups import grouped
from lingconv.cli.progress_display import make_watcher
from lingconv.cli.terminal import terminal
from lingconv.cli.units import file_size
from lingconv.cli.verify import ANSWER_IS_NO

_MAX_SHOWN = 20


@grouped
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Read the tensors, not only headers.")
    ] = True,
    jobs: Jobs = 0,
    *,
    printed: DisplayFlags,
) -> None:
    """List the names, shapes, dtypes and values that differ between two checkpoints.

    Compares what is stored, tensor by tensor, with config and other files; `verify` compares what
    it means. Exit code 0 when nothing differs, else 1. Example: `lingconv diff old new --no-values`
    """
    with make_watcher("diff") as watcher:
        found = lingconv.api.diff(a, b, values=values, jobs=jobs, watcher=watcher)
    shown = found.differences if printed.verbose else found.differences[:_MAX_SHOWN]
    kinds = Counter(difference.kind for difference in found.differences)
    lines = [f"{each.kind:<10} {each.name}  {each.message}" for each in shown]
    if len(shown) < len(found.differences):
        lines.append(
            f"... and {len(found.differences) - len(shown):,} more (-v or --json show all)"
        )
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()) or "nothing differs"
    read = f", {file_size(found.bytes_read)} read" if values else ""
    lines.append(f"{counts}; {found.tensors:,} tensors in both{read}")
    terminal.result(lines, found.to_json(), "differ" if found.differences else "same")
    if found.differences:
        raise typer.Exit(ANSWER_IS_NO)
