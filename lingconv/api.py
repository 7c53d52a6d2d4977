"""The verbs, as functions: what the commands do, without a terminal."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lingconv import engine
from lingconv.containers.gguf import SUFFIX
from lingconv.engine import Publish, Resources, Result, execute
from lingconv.errors import DestinationError, UsageError
from lingconv.formats import load_families
from lingconv.hub.address import HubAddress, is_hub, parse_address, staging_folder
from lingconv.inspection import Report, inspect_model
from lingconv.journal import RunFolder, pinned_commits
from lingconv.machine import num_processors
from lingconv.merging import open_average
from lingconv.model import Model
from lingconv.options import (
    ConvertOptions,
    ForwardOptions,
    Fp8Options,
    Level,
    PublishOptions,
    Target,
    TargetDType,
    VerifyOptions,
)
from lingconv.origins import Average
from lingconv.plan import Plan
from lingconv.planner import build_average, build_plan
from lingconv.progress import Progress, Unwatched, Watcher
from lingconv.readers import open_checkpoint
from lingconv.recognise import Given, recognise
from lingconv.weighting import Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from lingconv.hub.publisher import Publisher
    from lingconv.hub.push import Pushed
    from lingconv.reference.forward import Trace
    from lingconv.reference.prompts import NextToken
    from lingconv.verification.diff import Diff
    from lingconv.verification.verdict import Verdict


def open_model(
    source: str | Path, *, formats: str | None = None, given: Given | None = None
) -> Model:
    """Open a checkpoint and find out what it is.

    `formats` is a family file or a folder of them, in place of the built-in ones; `given` is what
    the checkpoint does not say of itself.
    """
    main_params = given is not None and given.main_params
    checkpoint = open_checkpoint(source, main_params=main_params)
    return recognise(checkpoint, load_families(formats), given)


def inspect(
    source: str | Path, *, formats: str | None = None, given: Given | None = None
) -> Report:
    """Return what `source` is, and everything odd about it. Reads headers only."""
    return inspect_model(open_model(source, formats=formats, given=given))


def plan(
    source: str | Path,
    options: ConvertOptions | None = None,
    *,
    destination: str | Path = "",
    formats: str | None = None,
    given: Given | None = None,
) -> Plan:
    """Return the plan of a conversion, down to the byte, without writing anything.

    `destination` gives GGUF files their name.
    """
    options = _named(options or ConvertOptions(), Path(destination))
    return build_plan(open_model(source, formats=formats, given=given), options)


def disk_needed(
    plan: Plan, destination: str | Path, resources: Resources | None = None
) -> tuple[Path, int]:
    """Return the folder where a run keeps what it writes, and the most bytes that are there."""
    resources = resources or Resources()
    if not is_hub(destination):
        return Path(destination), engine.disk_needed(plan, resources, publishes=False)
    folder = staging_folder(parse_address(str(destination)), resources.staging)
    return folder, engine.disk_needed(plan, resources, publishes=True)


def convert(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions | None = None,
    *,
    formats: str | None = None,
    given: Given | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    publish: PublishOptions | None = None,
) -> Result:
    """Convert `source` into the folder or GGUF file `destination`; the same call again resumes.

    Both may be on the Hub. What `source` stands for there is looked up once: a run that goes on
    reads the commit that it began with. `publish` says how a repository is written to.

    Raises the errors of `lingconv.errors`.
    """
    _refuse_overlap(source, destination)
    options = _named(options or ConvertOptions(), Path(destination))
    run = _Run(destination, resources or Resources(), publish, fresh=fresh)
    model = open_model(run.pinned(source), formats=formats, given=given)
    return run.execute(build_plan(model, options), [model], [source], progress)


def plan_average(
    sources: Sequence[str | Path],
    weighting: Weighting,
    options: ConvertOptions | None = None,
    *,
    destination: str | Path = "",
    formats: str | None = None,
    given: Given | None = None,
) -> tuple[Plan, Average]:
    """Return the plan of `merge_checkpoints`, and the checkpoints as they were opened."""
    options = _named(options or ConvertOptions(), Path(destination))
    families = load_families(formats)
    main_params = given is not None and given.main_params
    average = open_average(
        [str(source) for source in sources],
        weighting,
        partial(open_checkpoint, main_params=main_params),
        partial(recognise, families=families, given=given),
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
    given: Given | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    publish: PublishOptions | None = None,
) -> Result:
    """Average checkpoints of one model, oldest first, and convert the average in the same pass.

    Sums are float64, rounded once. Layouts and encodings of the sources may differ; config and
    small files are those of the last one. `report` is an HTML file to show the weights in. All of
    them may be on the Hub, as for `convert`. The same call again resumes. Raises the errors of
    `lingconv.errors`.
    """
    for source in sources:
        _refuse_overlap(source, destination)
    run = _Run(destination, resources or Resources(), publish, fresh=fresh)
    pinned = [run.pinned(source) for source in sources]
    built, average = plan_average(
        pinned, weighting, options, destination=destination, formats=formats, given=given
    )
    if report is not None:
        from lingconv import average_report

        average_report.write(built, str(destination), Path(report))
    return run.execute(built, average.models, sources, progress)


def quantize(
    source: str | Path,
    destination: str | Path,
    fp8: Fp8Options | None = None,
    *,
    formats: str | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    publish: PublishOptions | None = None,
) -> Result:
    """Quantize to FP8, layout kept: `convert` with `dtype="fp8"`."""
    options = ConvertOptions(dtype=TargetDType.FP8, fp8=fp8 or Fp8Options())
    return convert(
        source,
        destination,
        options,
        formats=formats,
        resources=resources,
        progress=progress,
        fresh=fresh,
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
    if is_hub(destination):
        raise UsageError("random weights are written to a folder", hint="then `lingconv push` it")
    model = synthetic_model(
        config, layers=layers, dense_layers=dense_layers, mtp=mtp, seed=seed, formats=formats
    )
    options = _named(options or ConvertOptions(), Path(destination))
    return execute(
        build_plan(model, options),
        [model.checkpoint.storage],
        Path(destination),
        resources=resources,
        progress=progress,
        fresh=fresh,
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
    from lingconv import synthetic  # numba is not needed for anything else here

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
    given: Given | None = None,
    watcher: Watcher | None = None,
) -> "Trace":
    """Run the reference forward pass over `source`, one layer in memory at a time.

    `tokens` are ids as `1,2,3` or a file with them; else a prompt, else a fixed sample.
    """
    from lingconv.reference.forward import trace  # torch is not needed for anything else here

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
    given: Given | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
) -> "Verdict":
    """Return whether checkpoint `target` is what `source` became; reads, writes nothing.

    `given` is what `source` does not say of itself.

    Raises CheckpointError when `source` cannot be trusted, or `target` is no checkpoint at all;
    everything else that is wrong with `target` is a finding of the verdict.
    """
    from lingconv.verification.run import default_level
    from lingconv.verification.run import verify as run

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
    from lingconv.hub import push as pushing  # with huggingface_hub

    address = parse_address(repository)
    if address.path:
        raise UsageError(f"{repository}: a folder becomes a whole repository, leave the path out")
    return pushing.push(
        Path(folder),
        address,
        publish or PublishOptions(),
        pushing.read_proof(verdict, report),
        progress,
    )


def check_report() -> None:
    """Raise UsageError when reports cannot be drawn here."""
    from lingconv import pages

    pages.check()


def write_report(verdict: "Verdict", path: str | Path) -> None:
    """Write a verdict as one HTML file that needs nothing else. Needs the extra `report`."""
    from lingconv.verification import report

    report.write(verdict, Path(path))


def input_ids(
    model: Model, *, prompt: str | None = None, chat: bool = False, tokens: str | None = None
) -> "Tensor":
    """Return the token ids [B, S] that were asked for, or the fixed sample."""
    from lingconv.reference import prompts

    if prompt is not None and tokens is not None:
        raise UsageError("`--prompt` and `--tokens` are two ways to say the same thing")
    if chat and prompt is None:
        raise UsageError("`--chat` needs a `--prompt`")
    if tokens is not None:
        return prompts.parse_tokens(tokens)
    if prompt is not None:
        return prompts.Text(model.checkpoint.storage).encode(prompt, chat=chat)
    return prompts.sample_ids(model.symbols["vocab_size"])


def next_tokens(source: str | Path, trace: "Trace", count: int = 5) -> list["NextToken"]:
    """Return the likeliest tokens after the last one of each row, with texts where there are."""
    from lingconv.reference import prompts

    return prompts.next_tokens(open_checkpoint(source).storage, trace.tensors["logits"], count)


class _Run:
    """Where a run writes to, what it may do there, and which commits it reads."""

    def __init__(
        self,
        destination: str | Path,
        resources: Resources,
        publish: PublishOptions | None,
        *,
        fresh: bool,
    ) -> None:
        self._resources = resources
        self._fresh = fresh
        self._options = publish or PublishOptions()
        self._options.check()
        self._address: HubAddress | None = None
        if is_hub(destination):
            self._address = parse_address(str(destination))
            self._folder = staging_folder(self._address, resources.staging)
        else:
            self._folder = Path(destination)
            if self._options != PublishOptions():
                raise UsageError(
                    "`--create`, `--public`, `--pr` and `--replace` are for repositories",
                    hint="let DST be `hf://org/name`",
                )
        self._commits = {} if fresh else pinned_commits(self._folder)

    def pinned(self, source: str | Path) -> str:
        """Return a source; one on the Hub at the commit that an earlier run began with."""
        commit = self._commits.get(str(source))
        if commit is None or not is_hub(source):
            return str(source)
        return str(parse_address(str(source))._replace(revision=commit))

    def execute(
        self,
        plan: Plan,
        models: Sequence[Model],
        sources: Sequence[str | Path],
        progress: Progress | None,
    ) -> Result:
        """Carry out a plan; `sources` are the checkpoints as the user named them."""
        return execute(
            plan,
            [model.checkpoint.storage for model in models],
            self._folder,
            resources=self._resources,
            progress=progress,
            fresh=self._fresh,
            commits=_commits(sources, models),
            publish=self._publish(plan),
        )

    def _publish(self, plan: Plan) -> Publish | None:
        address, share = self._address, self._resources.disk_share(publishes=True)
        if address is None:
            return None

        def begin(folder: RunFolder, progress: Progress) -> "Publisher":
            from lingconv.hub.publisher import Publisher  # with huggingface_hub

            return Publisher(address, self._options, plan, folder, progress, share)

        return begin


def _commits(sources: Sequence[str | Path], models: Sequence[Model]) -> dict[str, str]:
    """Return the commits that were read, by the addresses that the user wrote."""
    read = [
        parse_address(m.checkpoint.storage.uri) for m in models if is_hub(m.checkpoint.storage.uri)
    ]
    found = {}
    for source in filter(is_hub, map(str, sources)):
        asked = parse_address(source)
        for address in read:
            if address.repository == asked.repository and asked.revision in ("", address.revision):
                found[source] = address.revision
    return found


def _named(options: ConvertOptions, destination: Path) -> ConvertOptions:
    """Return the options with the name that DST gives to GGUF files."""
    if destination.suffix != SUFFIX:
        return options
    if options.layout != Target.GGUF:
        raise UsageError(
            f"{destination} is the name of a GGUF file, `--to` is {options.layout}",
            hint="leave `--to` out, or name a folder",
        )
    return replace(options, gguf=replace(options.gguf, stem=destination.stem))


def _refuse_overlap(source: str | Path, destination: str | Path) -> None:
    """Refuse to write into the source."""
    if is_hub(source) or is_hub(destination):
        return
    inner, outer = Path(destination).resolve(), Path(source).resolve()
    if inner == outer or outer in inner.parents:
        raise DestinationError(
            f"{destination} is inside the source {source}", hint="choose a folder of its own"
        )
