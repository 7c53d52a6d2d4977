"""The commands, gathered."""

from typing import Annotated

import typer

from lingconv.cli import (
    convert,
    diff,
    env,
    finish,
    formats,
    forward,
    inspect,
    merge,
    plan,
    push,
    quantize,
    synth,
    verify,
)
from lingconv.cli.command_classes import Command, Group
from lingconv.version import __version__

app = typer.Typer(
    name="lingconv",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Converts, quantizes and checks very large checkpoints, streamed in bounded memory.",
    epilog="Exit codes: 0 done, 1 the answer is no, 2 usage, 3 bad checkpoint, 4 permission,"
    " 5 network, 6 disk or memory, 7 destination conflict, 70 a bug. See docs/reference.md.",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lingconv {__version__}")
        raise typer.Exit


@app.callback()
def lingconv(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Converts, quantizes and checks very large checkpoints, streamed in bounded memory."""


for command in (
    inspect.inspect,
    plan.plan,
    convert.convert,
    quantize.quantize,
    verify.verify,
    finish.finish,
    push.push,
    diff.diff,
    forward.forward,
    synth.synth,
    formats.formats,
    env.env,
):
    app.command(cls=Command)(command)
app.add_typer(merge.app, name="merge")
