"""A finished folder into a repository: weights first, what makes them a checkpoint last.

Nothing is sent that the Hub has already, so that the same command goes on after a kill; at its end
sizes and hashes of all files are compared with what the Hub lists.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lingconv.checkpoint.open import read_all
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.hf import safetensors
from lingconv.containers.hf.small_files import OTHER_WEIGHTS
from lingconv.errors import CheckpointError, DestinationError, UsageError, resumable
from lingconv.execution.closing.model_card import CardInputs, model_card, published_record
from lingconv.execution.journal import JOURNALS
from lingconv.execution.progress import Progress, Silent
from lingconv.execution.run_folder import STATE_NAME, VERDICT_NAME
from lingconv.storage import Storage
from lingconv.storage.file_names import CARD_NAME, CONFIG_NAME, PARTIAL_SUFFIX, RECORD_NAME, SUFFIX
from lingconv.storage.hub.address import HubAddress
from lingconv.storage.hub.repository import Repository
from lingconv.storage.local import LocalStorage
from lingconv.storage.overlay import Overlay
from lingconv.storage.upload_target import ListedFile, PublishedCommit, PublishOptions

_WEIGHTS = (".safetensors", *OTHER_WEIGHTS)
_BATCH_BYTES = 50_000_000_000
_BATCH_FILES = 50
REPORT_NAME = "lingconv-verify.html"


class Pushed(NamedTuple):
    """What a push did; files that the Hub had already count as found."""

    commit: PublishedCommit
    files_sent: int
    bytes_sent: int
    files_found: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Proof:
    """What `verify` said: its JSON document, and its report."""

    verdict: Mapping[str, Any] | None = None
    report: Path | None = None


def read_proof(verdict: str | Path | None, report: str | Path | None, schema: str) -> Proof:
    """Return what `verify` left in files: a document of `schema`, and a report.

    Raises UsageError when they are something else.
    """
    value = _read_json(Path(verdict)) if verdict else None
    if value is not None and value.get("schema") != schema:
        raise UsageError(f"{verdict} is not what `lingconv verify --json` prints")
    if report and not Path(report).is_file():
        raise UsageError(f"{report} is not there")
    return Proof(value, Path(report) if report else None)


def push(
    folder: Path,
    address: HubAddress,
    options: PublishOptions,
    proof: Proof,
    progress: Progress | None = None,
) -> Pushed:
    """Put a finished checkpoint into a repository; the same call again goes on.

    Raises the errors of `lingconv.errors`: a folder that is not finished or not sound, a repository
    that holds another checkpoint, or what stands in the way.
    """
    started = time.monotonic()
    options.check()
    files, indexes = _finished_files(folder)
    weights = {name: folder / name for name in files if name.endswith(_WEIGHTS)}
    repository = Repository(address, options)
    for name, path in weights.items():
        repository.check_size(name, path.stat().st_size)
    repository.prepare(claims=weights)
    described = _describe(folder, address.repository, sorted(weights), proof)
    small: dict[str, Path | bytes] = {n: folder / n for n in files if n not in weights}
    if proof.report is not None:
        small[REPORT_NAME] = proof.report
    if described is not None:
        small.pop(CARD_NAME, None)
        if repository.card_for():
            small[CARD_NAME] = model_card(described).encode()
    repository.check_names([*weights, *small])
    if CARD_NAME in small:
        repository.check_card(small[CARD_NAME])
    record = _read_json(folder / RECORD_NAME)
    if record:
        small[RECORD_NAME] = published_record(record)
    there = {name for name, path in weights.items() if repository.holds(name, path)}
    _make_room(repository, weights, there, [*indexes, CONFIG_NAME, RECORD_NAME], options)
    with resumable():
        return _Push(repository, progress or Silent(), started).run(weights, there, small)


class _Push:
    def __init__(self, repository: Repository, progress: Progress, started: float) -> None:
        self._repository = repository
        self._progress = progress
        self._started = started

    def run(
        self, weights: Mapping[str, Path], there: set[str], small: Mapping[str, Path | bytes]
    ) -> Pushed:
        missing = {name: path for name, path in weights.items() if name not in there}
        nbytes = sum(path.stat().st_size for path in missing.values())
        self._progress.sending(nbytes)
        sent: dict[str, ListedFile] = {name: self._repository.files[name] for name in there}
        for batch in _batches(missing):
            began = time.monotonic()
            added = self._repository.add_weights(batch, len(sent), len(weights))
            seconds = (time.monotonic() - began) / len(batch)
            for name, file in added.items():
                self._progress.file_sent(name, file.size, seconds)
            sent |= added
        return Pushed(
            self._repository.complete(small, sent),
            len(missing),
            nbytes,
            len(there),
            time.monotonic() - self._started,
        )


def _batches(files: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Yield a few files at a time, each of them a commit."""
    batch: dict[str, Path] = {}
    nbytes = 0
    for name, path in files.items():
        size = path.stat().st_size
        if batch and (nbytes + size > _BATCH_BYTES or len(batch) == _BATCH_FILES):
            yield batch
            batch, nbytes = {}, 0
        batch[name] = path
        nbytes += size
    if batch:
        yield batch


class _Finished(NamedTuple):
    """The files of a finished checkpoint, and those of them that say what the weights are."""

    files: Sequence[str]
    indexes: Sequence[str]


def _finished_files(folder: Path) -> _Finished:
    """Return the files of a checkpoint, which are enough to read it, and its indexes.

    Raises an error that says what it lacks.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    storage = LocalStorage(folder)
    listed = storage.files()
    unfinished = [name for name in listed if name.endswith(PARTIAL_SUFFIX)]
    unfinished += [str(path) for path in (folder / STATE_NAME).rglob(JOURNALS)]
    if unfinished:
        raise DestinationError(
            f"{folder} is not finished",
            details=unfinished,
            hint="run the command that writes it again, then push",
        )
    if outside := storage.left_out():
        raise CheckpointError(
            f"{folder} holds what cannot be published",
            details=[f"{name}: {why}" for name, why in outside.items()],
            hint="put the files themselves into the folder, or remove these names",
        )
    models = _sound(storage, folder)
    read = {name for model in models for name in model.shards}  # an index may be hidden
    files = sorted({*listed, *read})
    published = _sound(Overlay(storage, files, {}), folder)
    if [model.tensors.keys() for model in published] != [model.tensors.keys() for model in models]:
        raise CheckpointError(f"{folder}: what would be published is not what it holds")
    indexes = [name for name in read if not name.endswith(_WEIGHTS)]
    return _Finished(files, [*indexes, safetensors.INDEX_NAME])


def _sound(storage: Storage, folder: Path) -> list[Checkpoint]:
    """Return every checkpoint of a storage; raise CheckpointError for one that has faults."""
    models = read_all(storage)
    fatal = [fault for model in models for fault in model.faults if fault.fatal]
    if fatal:
        raise CheckpointError(f"{folder} has {len(fatal)} faults", faults=fatal)
    return models


def _describe(
    folder: Path, repository: str, weights: Sequence[str], proof: Proof
) -> CardInputs | None:
    """Return what the card is made of; None where lingconv has no record of the folder."""
    record = _read_json(folder / RECORD_NAME)
    if not record:
        records = sorted((folder / STATE_NAME).glob(f"*{SUFFIX}/{RECORD_NAME}"))
        record = _read_json(records[0]) if records else {}
    if not record:
        return None
    card = folder / CARD_NAME
    kept = next((folder / STATE_NAME).rglob(VERDICT_NAME), None)
    verdict = proof.verdict or (_read_json(kept) if kept else None)
    return CardInputs(
        record,
        _read_json(folder / CONFIG_NAME),
        card.read_text("utf-8", "replace") if card.exists() else "",
        repository,
        weights[0] if weights else "",
        verdict,
        REPORT_NAME if proof.report else "",
    )


def add_proof(address: HubAddress, proof: Proof) -> PublishedCommit | None:
    """Put the numbers of a proof into the card of a repository that lingconv has written.

    Returns None where it has no record of what was done, as those of GGUF files have not, or a card
    of somebody's own.
    """
    repository = Repository(address, PublishOptions())
    repository.prepare()
    if RECORD_NAME not in repository.files or not repository.card_for():
        return None
    storage = repository.storage()
    has_card = CARD_NAME in repository.files
    weights = sorted(name for name in repository.files if name.endswith(_WEIGHTS))
    described = CardInputs(
        json.loads(storage.read(RECORD_NAME)),
        json.loads(storage.read(CONFIG_NAME)),
        storage.read(CARD_NAME).decode("utf-8", "replace") if has_card else "",
        address.repository,
        weights[0],
        proof.verdict,
    )
    repository.commit({CARD_NAME: model_card(described).encode()}, "Add the numbers of a proof")
    return repository.commit_now


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _make_room(
    repository: Repository,
    weights: Mapping[str, Path],
    there: set[str],
    completing: Sequence[str],
    options: PublishOptions,
) -> None:
    """Remove what would make a mixture of two checkpoints, or refuse to make one.

    `completing` are the files that make a checkpoint of weights.
    """
    shards = [name for name in weights if not name.endswith(SUFFIX)]
    if not shards:
        return  # GGUF files stand side by side
    foreign = [
        name
        for name in repository.files
        if name.endswith(_WEIGHTS) and not name.endswith(SUFFIX) and name not in weights
    ]
    if set(shards) - there:
        foreign += [name for name in completing if name in repository.files]
    repository.make_room(foreign, replace=options.replace)
