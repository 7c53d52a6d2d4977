"""`lingconv convert`: from any checkpoint to another layout, dtype or shard size."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lingconv
from lingconv.cli import plan as plan_command
from lingconv.cli import verify as verify_command
from lingconv.cli.common_options import (
    Destination,
    DisplayFlags,
    Formats,
    Fresh,
    FromMainParams,
    HubFlags,
    Recheck,
    ResourceFlags,
    Source,
    SourceFlags,
    Verify,
)
from lingconv.cli.convert_options import ConvertFlags
from lingconv.cli.option_groups import grouped
from lingconv.cli.progress_display import make_progress, make_watcher
from lingconv.cli.terminal import terminal
from lingconv.cli.units import file_size
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.errors import UsageError
from lingconv.execution.resources import Resources
from lingconv.plans.options import ConvertOptions
from lingconv.storage.upload_target import PublishOptions
from lingconv.verification.options import VerifyOptions

if TYPE_CHECKING:
    from lingconv.execution.engine import Result
    from lingconv.verification.verdict import Verdict

SCHEMA = "lingconv.convert/1"


@grouped
def convert(
    source: Source,
    destination: Destination,
    asked: ConvertFlags,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Show the plan and stop.")
    ] = False,
    *,
    verify: Verify = False,
    fresh: Fresh = False,
    recheck: Recheck = False,
    limits: ResourceFlags,
    hub: HubFlags,
    formats: Formats = None,
    said: SourceFlags,
    from_main_params: FromMainParams = False,
    printed: DisplayFlags,
) -> None:
    """Convert a checkpoint. The same command resumes a run that was stopped.

    Examples: `lingconv convert Ling-1T-FP8 Ling-1T --dtype bf16`,
    `lingconv convert Ling-1T-FP8 Ling-1T-Q4_K_M.gguf --outtype q4_k_m --split-max-size 50GB`,
    `lingconv convert hf://inclusionAI/Ling-1T hf://me/Ling-1T-FP8 --dtype fp8 --create`
    """
    options, given = asked.options(destination), said.given(main_params=from_main_params)
    if dry_run:
        built = lingconv.api.plan(
            source, options, destination=destination, formats=formats, given=given
        )
        plan_command.show(built, destination, hub.resources(limits), verbose=printed.verbose)
        return
    run(
        source,
        destination,
        options,
        hub.resources(limits),
        hub.publish.options,
        formats=formats,
        given=given,
        fresh=fresh,
        recheck=recheck,
        verify=verify,
    )


def run(
    source: str,
    destination: str,
    options: ConvertOptions,
    limits: Resources,
    publish: PublishOptions,
    *,
    formats: str | None,
    given: SourceOverrides | None = None,
    fresh: bool,
    recheck: bool,
    verify: bool,
) -> None:
    """Convert with progress on stderr, prove the result if `verify`, and print both."""
    if verify and limits.part:
        raise UsageError("`--verify` is for a whole run", hint="`lingconv verify` when all is done")
    with make_progress() as progress:
        result = lingconv.api.convert(
            source,
            destination,
            options,
            formats=formats,
            given=given,
            resources=limits,
            progress=progress,
            fresh=fresh,
            recheck=recheck,
            publish=publish,
        )
    verdict = None
    if verify:
        with make_watcher("verify") as watcher:
            verdict = lingconv.api.verify(
                source,
                result.destination,
                VerifyOptions(mtp=options.mtp),
                formats=formats,
                given=given,
                jobs=limits.jobs,
                watcher=watcher,
            )
        if not lingconv.api.keep_verdict(result, verdict):
            terminal.note("the card of the repository stays as it is: it has no table of the proof")
    show(result, verdict)


def show(
    result: "Result", verdict: "Verdict | None" = None, more: Mapping[str, Any] | None = None
) -> None:
    """Print what a run did and what came of it; exit with 1 when the proof failed.

    `more` goes into the document of `--json`.
    """
    rate = result.bytes_written / result.seconds if result.seconds else 0.0
    found = result.files_found_finished
    line = (
        f"{result.destination}: nothing to do, all {found} weight files are there"
        if not result.files_written
        else f"{result.destination}: {result.files_written} weight files,"
        f" {file_size(result.bytes_written)} in {result.seconds:.1f} s ({file_size(rate)}/s)"
        + (f", {found} were there" if found else "")
    )
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "destination": result.destination,
        "commit_url": result.commit_url,
        "digest": result.digest,
        "files_written": result.files_written,
        "files_found_finished": found,
        "bytes_written": result.bytes_written,
        "seconds": round(result.seconds, 3),
        "warnings": list(result.warnings),
        **(more or {}),
    }
    proof = [result.commit_url] if result.commit_url else []
    if verdict is not None:
        value["verdict"] = verdict.to_json()
        proof += verify_command.lines(verdict, verbose=terminal.verbose)
    terminal.result([line, *proof], value, result.commit_url or result.destination)
    for warning in result.warnings:
        terminal.warning(warning)
    if verdict is not None and not verdict.ok:
        raise typer.Exit(verify_command.ANSWER_IS_NO)
