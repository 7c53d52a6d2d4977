"""The verbs, as functions: what the commands do, without a terminal."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lingconv.checkpoint.inspection import Report, inspect_model
from lingconv.checkpoint.open import open_checkpoint
from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.checkpoint.recognition import recognise
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.errors import DestinationError, UsageError
from lingconv.execution.destination import Destination
from lingconv.execution.engine import Result, execute
from lingconv.execution.progress import Progress
from lingconv.execution.request import RunRequest
from lingconv.execution.resources import Resources
from lingconv.execution.run_folder import VERDICT_NAME, kept_plan, location_of, pinned_commits
from lingconv.model.family_file import load_families
from lingconv.planner.average_sources import open_average
from lingconv.planner.planner import build_average, build_plan
from lingconv.planner.sources import Average
from lingconv.plans.checkpoint_weights import Weighting
from lingconv.plans.options import ConvertOptions, FourBitOptions, Fp8Options, Target, TargetDType
from lingconv.plans.plan import Plan
from lingconv.storage.file_names import SUFFIX
from lingconv.storage.hub.address import parse_address
from lingconv.storage.local_files import replace_file
from lingconv.storage.locations import is_remote, open_storage
from lingconv.storage.machine import num_processors
from lingconv.storage.upload_target import PublishOptions
from lingconv.verification.options import ForwardOptions, Level, VerifyOptions
from lingconv.verification.progress import Unwatched, Watcher

if TYPE_CHECKING:
    from torch import Tensor

    from lingconv.execution.estimate import Estimate
    from lingconv.execution.publishing.push import Pushed
    from lingconv.verification.diff import Diff
    from lingconv.verification.reference.forward import Trace
    from lingconv.verification.reference.prompts import NextToken
    from lingconv.verification.verdict import Verdict


def open_model(
    source: str | Path, *, formats: str | None = None, given: SourceOverrides | None = None
) -> Model:
    """Open a checkpoint and find out what it is.

    `formats` is a family file or a folder of them, in place of the built-in ones; `given` is what
    the checkpoint does not say of itself.
    """
    return recognise(open_checkpoint(source, given), load_families(formats), given)


def inspect(
    source: str | Path, *, formats: str | None = None, given: SourceOverrides | None = None
) -> Report:
    """Return what `source` is, and everything odd about it. Reads headers only."""
    return inspect_model(open_model(source, formats=formats, given=given))


def plan(
    source: str | Path,
    options: ConvertOptions | None = None,
    *,
    destination: str | Path = "",
    formats: str | None = None,
    given: SourceOverrides | None = None,
) -> Plan:
    """Return the plan of a conversion, down to the byte, without writing anything.

    `destination` gives GGUF files their name.
    """
    options = _named(options or ConvertOptions(), Path(destination))
    return build_plan(open_model(source, formats=formats, given=given), options)


def convert(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions | None = None,
    *,
    formats: str | None = None,
    given: SourceOverrides | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    recheck: bool = False,
    publish: PublishOptions | None = None,
) -> Result:
    """Convert `source` into the folder or GGUF file `destination`; the same call again resumes.

    Both may be on the Hub. What `source` stands for there is looked up once: a run that goes on
    reads the commit that it began with. `publish` says how a repository is written to.

    Raises the errors of `lingconv.errors`.
    """
    request = RunRequest.of(resources, progress, publish, fresh=fresh, recheck=recheck)
    target = Destination(destination, request)
    options = _named(options or ConvertOptions(), Path(destination))
    model = open_model(target.pinned(source), formats=formats, given=given)
    return target.execute(build_plan(model, options), [model])


def estimate(
    plan: Plan,
    destination: str | Path,
    resources: Resources | None = None,
    *,
    machines: int = 1,
    network_bytes_per_s: float = 0.0,
    profile: str | Path | None = None,
) -> "Estimate":
    """Return what a plan is going to take, by a short calibration of this machine.

    `profile` is a file with the rates of a machine: read where it is there, else written.
    """
    from lingconv.execution import estimate as estimating  # nobody who only plans needs an engine

    path = Path(profile) if profile else None
    if path is not None and path.exists():
        rates = estimating.read_profile(path)
    else:
        storages = [open_storage(source.uri)[0] for source in plan.sources]
        folder, _ = Destination(destination, RunRequest.of(resources)).disk(plan)
        rates = estimating.calibrate(plan, storages, folder, resources or Resources())
        if path is not None:
            replace_file(path, [(json.dumps(rates.to_json(), indent=2) + "\n").encode()])
    return estimating.estimate(
        plan,
        rates,
        machines=machines,
        network_bytes_per_s=network_bytes_per_s,
        reads_far=any(is_remote(source.uri) for source in plan.sources),
        writes_far=is_remote(destination),
    )


def finish(destination: str | Path, *, progress: Progress | None = None) -> Result:
    """Make a checkpoint of what the parts of a run have written: check all, write index and config.

    Raises DestinationError that lists the files that are missing.
    """
    path = Path(destination)
    plan = kept_plan(path)
    missing = [f.name for f in plan.files if not (location_of(path).folder / f.name).exists()]
    if missing:
        raise DestinationError(
            f"{path} lacks {len(missing)} of {len(plan.files)} weight files",
            details=missing,
            hint="run the parts that write them; the same command goes on where it stopped",
        )
    storages = [open_storage(source.uri)[0] for source in plan.sources]
    request = RunRequest.of(progress=progress)
    return execute(plan, storages, path, request, commits=pinned_commits(path))


def plan_average(
    sources: Sequence[str | Path],
    weighting: Weighting,
    options: ConvertOptions | None = None,
    *,
    destination: str | Path = "",
    formats: str | None = None,
    given: SourceOverrides | None = None,
) -> tuple[Plan, Average]:
    """Return the plan of `merge_checkpoints`, and the checkpoints as they were opened."""
    options = _named(options or ConvertOptions(), Path(destination))
    families = load_families(formats)
    average = open_average(
        [str(source) for source in sources],
        weighting,
        partial(open_checkpoint, overrides=given),
        partial(recognise, families=families, overrides=given),
    )
    return build_average(average, options), average


def merge_checkpoints(
    sources: Sequence[str | Path],
    destination: str | Path,
    weighting: Weighting,
    options: ConvertOptions | None = None,
    *,
    report: str | Path | None = None,
    formats: str | None = None,
    given: SourceOverrides | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    recheck: bool = False,
    publish: PublishOptions | None = None,
) -> Result:
    """Average checkpoints of one model, oldest first, and convert the average in the same pass.

    Sums are float64, rounded once. Layouts and encodings of the sources may differ; config and
    small files are those of the last one. `report` is an HTML file to show the weights in. All of
    them may be on the Hub, as for `convert`. The same call again resumes. Raises the errors of
    `lingconv.errors`.
    """
    request = RunRequest.of(resources, progress, publish, fresh=fresh, recheck=recheck)
    target = Destination(destination, request)
    pinned = [target.pinned(source) for source in sources]
    built, average = plan_average(
        pinned, weighting, options, destination=destination, formats=formats, given=given
    )
    if report is not None:
        from lingconv.verification.reports import average_page as average_report

        average_report.write(built, str(destination), Path(report))
    return target.execute(built, average.models)


def quantize(
    source: str | Path,
    destination: str | Path,
    fp8: Fp8Options | None = None,
    four_bits: FourBitOptions | None = None,
    *,
    dtype: str = TargetDType.FP8,
    formats: str | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    recheck: bool = False,
    publish: PublishOptions | None = None,
) -> Result:
    """Quantize to FP8, NVFP4, MXFP4 or INT4, layout kept: `convert` with that `dtype`."""
    options = ConvertOptions(
        dtype=dtype, fp8=fp8 or Fp8Options(), four_bits=four_bits or FourBitOptions()
    )
    return convert(
        source,
        destination,
        options,
        formats=formats,
        resources=resources,
        progress=progress,
        fresh=fresh,
        recheck=recheck,
        publish=publish,
    )


def synth(
    config: str | Path,
    destination: str | Path,
    options: ConvertOptions | None = None,
    *,
    layers: int | None = None,
    dense_layers: int | None = None,
    mtp: int | None = None,
    seed: int = 0,
    headers_only: bool = False,
    formats: str | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> Result:
    """Write a checkpoint of random weights: `config` is a preset or a config.json."""
    if is_remote(destination):
        raise UsageError("random weights are written to a folder", hint="then `lingconv push` it")
    if resources is not None and resources.part is not None:
        raise UsageError("random weights are written by one run: leave `part` out")
    model = synthetic_model(
        config, layers=layers, dense_layers=dense_layers, mtp=mtp, seed=seed, formats=formats
    )
    options = _named(options or ConvertOptions(), Path(destination))
    return execute(
        build_plan(model, options),
        [model.checkpoint.storage],
        Path(destination),
        RunRequest.of(resources, progress, fresh=fresh),
        headers_only=headers_only,
    )


def synthetic_model(
    config: str | Path,
    *,
    layers: int | None = None,
    dense_layers: int | None = None,
    mtp: int | None = None,
    seed: int = 0,
    formats: str | None = None,
) -> Model:
    """Return the model that `synth` writes, to plan it without writing."""
    from lingconv.checkpoint import synthetic  # numba is not needed for anything else here

    families = load_families(formats)
    values = synthetic.cut_config(
        synthetic.read_config(str(config)),
        families[0],
        layers=layers,
        dense_layers=dense_layers,
        mtp=mtp,
    )
    return recognise(synthetic.synthetic_checkpoint(values, families[0], seed), families)


def forward(
    source: str | Path,
    options: ForwardOptions | None = None,
    *,
    prompt: str | None = None,
    chat: bool = False,
    tokens: str | None = None,
    formats: str | None = None,
    given: SourceOverrides | None = None,
    watcher: Watcher | None = None,
) -> "Trace":
    """Run the reference forward pass over `source`, one layer in memory at a time.

    `tokens` are ids as `1,2,3` or a file with them; else a prompt, else a fixed sample.
    """
    from lingconv.verification.reference.forward import (
        trace,  # torch is not needed for anything else here
    )

    model = open_model(source, formats=formats, given=given)
    ids = input_ids(model, prompt=prompt, chat=chat, tokens=tokens)
    return trace(model, ids, options, watcher or Unwatched())


def verify(
    source: str | Path,
    target: str | Path,
    options: VerifyOptions | None = None,
    *,
    prompt: str | None = None,
    chat: bool = False,
    tokens: str | None = None,
    formats: str | None = None,
    given: SourceOverrides | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
) -> "Verdict":
    """Return whether checkpoint `target` is what `source` became; reads, writes nothing.

    `given` is what `source` does not say of itself.

    Raises CheckpointError when `source` cannot be trusted, or `target` is no checkpoint at all;
    everything else that is wrong with `target` is a finding of the verdict.
    """
    from lingconv.verification.verify import default_level
    from lingconv.verification.verify import verify as run

    options = options or VerifyOptions()
    options.check()
    models = (
        open_model(source, formats=formats, given=given),
        open_model(target, formats=formats),
    )
    level = options.level or default_level(*models)
    ids = None
    if level == Level.FORWARD:
        ids = input_ids(models[0], prompt=prompt, chat=chat, tokens=tokens)
    return run(
        *models,
        ids,
        replace(options, level=level),
        jobs or num_processors() + 1,
        watcher or Unwatched(),
    )


def diff(
    a: str | Path,
    b: str | Path,
    *,
    values: bool = True,
    jobs: int = 0,
    watcher: Watcher | None = None,
) -> "Diff":
    """Return what differs between two checkpoints as they are stored; no family is needed."""
    from lingconv.verification.diff import diff as run

    return run(
        open_checkpoint(a),
        open_checkpoint(b),
        values=values,
        jobs=jobs or num_processors() + 1,
        watcher=watcher or Unwatched(),
    )


def push(
    folder: str | Path,
    repository: str,
    publish: PublishOptions | None = None,
    *,
    verdict: str | Path | None = None,
    report: str | Path | None = None,
    progress: Progress | None = None,
) -> "Pushed":
    """Put a finished folder into a repository: weights first, index, config and card last.

    `verdict` is what `verify --json` printed, for the card's table; `report` goes along. Nothing is
    sent that the Hub has already: the same call again goes on.
    """
    from lingconv.execution.publishing import push as pushing  # with huggingface_hub
    from lingconv.verification.verdict import SCHEMA as VERDICT_SCHEMA

    address = parse_address(repository)
    if address.path:
        raise UsageError(f"{repository}: a folder becomes a whole repository, leave the path out")
    return pushing.push(
        Path(folder),
        address,
        publish or PublishOptions(),
        pushing.read_proof(verdict, report, VERDICT_SCHEMA),
        progress,
    )


def keep_verdict(result: Result, verdict: "Verdict") -> bool:
    """Keep what was proven of a run's result: beside it, or in the card of its repository.

    Returns False where a repository has a card of somebody's own, or of GGUF files.
    """
    if result.branch:
        from lingconv.execution.publishing import push as pushing  # with huggingface_hub

        proof = pushing.Proof(verdict.to_json())
        return pushing.add_proof(parse_address(result.branch), proof) is not None
    if result.state is not None:
        replace_file(result.state / VERDICT_NAME, [json.dumps(verdict.to_json()).encode()])
    return True


def check_report() -> None:
    """Raise UsageError when reports cannot be drawn here."""
    from lingconv.verification.reports import page as pages

    pages.check()


def write_report(verdict: "Verdict", path: str | Path) -> None:
    """Write a verdict as one HTML file that needs nothing else. Needs the extra `report`."""
    from lingconv.verification.reports import verdict_page as report

    report.write(verdict, Path(path))


def input_ids(
    model: Model, *, prompt: str | None = None, chat: bool = False, tokens: str | None = None
) -> "Tensor":
    """Return the token ids [B, S] that were asked for, or the fixed sample."""
    from lingconv.verification.reference import prompts

    if prompt is not None and tokens is not None:
        raise UsageError("`prompt` and `tokens` are two ways to say the same thing")
    if chat and prompt is None:
        raise UsageError("`chat` needs a `prompt`")
    if tokens is not None:
        return prompts.parse_tokens(tokens)
    if prompt is not None:
        return prompts.Text(model.checkpoint.storage).encode(prompt, chat=chat)
    return prompts.sample_ids(model.symbols["vocab_size"])


def next_tokens(source: str | Path, trace: "Trace", count: int = 5) -> list["NextToken"]:
    """Return the likeliest tokens after the last one of each row, with texts where there are."""
    from lingconv.verification.reference import prompts

    return prompts.next_tokens(open_checkpoint(source).storage, trace.tensors["logits"], count)


def _named(options: ConvertOptions, destination: Path) -> ConvertOptions:
    """Return the options with the name that DST gives to GGUF files."""
    if destination.suffix != SUFFIX:
        return options
    if options.layout != Target.GGUF:
        raise UsageError(
            f"{destination} is the name of a GGUF file, `layout` is {options.layout}",
            hint="leave `layout` out, or name a folder",
        )
    return replace(options, gguf=replace(options.gguf, stem=destination.stem))
