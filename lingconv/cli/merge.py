"""`lingconv merge`: experts into one tensor for each layer, checkpoints into their average."""

from dataclasses import replace
from typing import Annotated

import typer

from lingconv.cli import convert
from lingconv.cli.grouped import grouped
from lingconv.cli.options import Destination, Formats, Fresh, Limits, Printed, Said, Source, Verify
from lingconv.cli.targets import ExpertsAs, OutputWords
from lingconv.options import DEFAULT_MERGED, Target

app = typer.Typer(no_args_is_help=True, help="Merge experts, or average checkpoints.")


@app.command()
@grouped
def experts(
    source: Source,
    destination: Destination,
    experts_as: ExpertsAs = DEFAULT_MERGED,
    split: Annotated[
        bool, typer.Option("--split", help="The other way: a tensor for each expert.")
    ] = False,
    *,
    output: OutputWords,
    verify: Verify = False,
    fresh: Fresh = False,
    limits: Limits,
    formats: Formats = None,
    said: Said,
    printed: Printed,
) -> None:
    """Stack the experts of each layer into one tensor, MTP layers included; dtypes are kept.

    The same as `convert --to hf-merged`, and `convert --to hf` with `--split`.

    Examples: `lingconv merge experts Ling-1T-FP8 out --experts-as transformers`,
    `lingconv merge experts out Ling-1T-FP8 --split`
    """
    options = replace(
        output.options(), layout=Target.HF if split else Target.HF_MERGED, merged=experts_as
    )
    convert.run(
        source,
        destination,
        options,
        limits.resources,
        formats=formats,
        given=said.given(),
        fresh=fresh,
        verify=verify,
    )
