"""Sending while converting: finished files are sent and deleted while the next are written.

    finished -> sent -> committed -> noted in the journal -> deleted        weights, a few at a time
    index, config, card and the small files                                 the last commit

That is for the Hub; in an object store it is the same, without commits.

At most `max_disk_bytes` of weights are on disk at any time. Uploads are slower than conversions, so
whatever is finished while one batch is on its way goes with the next. A repository without an index
and a config is visibly unfinished; killed anywhere, the same command goes on, and what the Hub has
already is neither made nor sent again.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from lingconv.errors import CheckpointError, ResourceError
from lingconv.execution.closing.closing_files import closing_names, record_of
from lingconv.execution.closing.model_card import CardInputs, model_card, published_record
from lingconv.execution.progress import Progress
from lingconv.execution.publishing.read_back import check_sent
from lingconv.execution.run_folder import RunFolder
from lingconv.plans.plan import OutputFile, Plan
from lingconv.storage.file_names import CARD_NAME, RECORD_NAME
from lingconv.storage.local_files import replace_file
from lingconv.storage.upload_target import (
    ListedFile,
    PublishedCommit,
    PublishOptions,
    UploadTarget,
)
from lingconv.version import __version__

_TURN_S = 0.1
_STATE_NAME = "pull_request"
# Weights of which a repository holds one set; of GGUF files it may hold several.
_SHARDS = (".safetensors", ".distcp", ".pt", ".bin")
_MEND_CARD = (
    f"mend the front matter of the source's {CARD_NAME} (the lines between the two `---`), then run"
    " the same command with `fresh`"
)
_AT_ONCE = 2  # one is written while another is sent


class Origin(NamedTuple):
    """What the base of a plan says of itself: its lingconv.json, and its model card."""

    record: Mapping[str, Any] | None
    card: str


class Publisher:
    """A Delivery that sends files to a store. Lives as long as its RunFolder is held."""

    def __init__(
        self,
        store: UploadTarget,
        options: PublishOptions,
        plan: Plan,
        origin: Origin,
        folder: RunFolder,
        progress: Progress,
        max_disk_bytes: int,
    ) -> None:
        self._store = store
        self.pull_request = 0
        self._options = options
        self._plan = plan
        self._origin = origin
        self._folder = folder
        self._progress = progress
        largest = max(file.nbytes for file in plan.files)
        store.check_size(max(plan.files, key=lambda file: file.nbytes).name, largest)
        self.room = max_disk_bytes or _AT_ONCE * largest
        if largest > self.room:
            raise ResourceError(
                f"the largest file has {largest:,} bytes, there is room for {self.room:,}",
                hint="raise `max_disk_bytes`, or make smaller files: `max_shard_bytes`",
            )
        self.differing = 0  # files that a recheck found to be others than were sent
        self._before: dict[str, ListedFile] = {}
        self._waiting: list[OutputFile] = []
        self._is_closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="publish", daemon=True)

    def begin(self) -> list[OutputFile]:
        """Look at the store; return the weight files that are still to be written.

        Raises DestinationError when it holds another model, and CheckpointError for a model card
        that it would refuse.
        """
        note = self._folder.state / _STATE_NAME
        number = int(note.read_text()) if note.exists() else 0
        opened = self._store.prepare(number, [file.name for file in self._plan.files])
        if opened and opened != number:
            replace_file(note, [f"{opened}\n".encode()])
        self.pull_request = opened
        self._check_small_files()
        self._refuse_foreign()
        todo = self._again() if self._folder.rechecks else self._unfinished()
        self._progress.sending(sum(file.nbytes for file in [*self._waiting, *todo]))
        self._thread.start()
        return todo

    def _again(self) -> list[OutputFile]:
        """Return all files: each is written anew, and sent if the store lists another digest."""
        self._before = dict(self._folder.sent)
        self._folder.sent.clear()
        for file in self._plan.files:
            self._folder.remove(file.name)
        return list(self._plan.files)

    def _unfinished(self) -> list[OutputFile]:
        """Return the files that are neither sent nor finished; finished ones wait to be sent."""
        todo = []
        for file in self._plan.files:
            sent = self._folder.sent.get(file.name)
            if sent is not None and self._store.files.get(file.name) == sent:
                self._folder.remove(file.name)  # a kill may have come before that
                continue
            self._folder.sent.pop(file.name, None)
            if self._folder.is_finished(file.name, file.nbytes):
                self.room -= file.nbytes
                self._waiting.append(file)
            else:
                todo.append(file)
        return todo

    def _check_small_files(self) -> None:
        """Ask the store whether it would take all names, and the card that comes last."""
        weights = [file.name for file in self._plan.files]
        repository = self._store.card_for()
        card = [CARD_NAME] if repository else []
        names = [*weights, *self._plan.side_files, *closing_names(self._plan), *card]
        self._store.check_names(list(dict.fromkeys(names)))
        if not repository:
            return
        try:
            self._store.check_card(self._card(repository))
        except CheckpointError as exc:  # a source that was mended is another one to this run
            raise CheckpointError(exc.message, details=exc.details, hint=_MEND_CARD) from exc

    def _refuse_foreign(self) -> None:
        """Refuse a repository that another model is in, unless it is to be replaced."""
        ours = {file.name for file in self._plan.files}
        foreign = [
            name
            for name in self._store.files
            if name.endswith(_SHARDS) and name not in ours and name not in self._folder.sent
        ]
        if not self._folder.sent:  # what says that a checkpoint is complete is not from this run
            foreign += [n for n in closing_names(self._plan) if n in self._store.files]
        foreign = [name for name in foreign if name != CARD_NAME]
        self._store.make_room(foreign, replace=self._options.replace)

    def has_room(self, file: OutputFile) -> bool:
        """Take the disk that a file needs, if there is so much of it."""
        with self._changed:
            if self._error is not None:
                raise self._error
            if file.nbytes > self.room:
                return False
            self.room -= file.nbytes
            return True

    def wait(self) -> None:
        """Return after a moment, or when a file was sent."""
        with self._changed:
            self._changed.wait(_TURN_S)

    def deliver(self, file: OutputFile) -> None:
        """Send a finished file, soon."""
        with self._changed:
            self._waiting.append(file)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while batch := self._next_batch():
                self._send(batch)
        except BaseException as exc:  # raised by whoever asks for room, or waits for the end
            with self._changed:
                self._error = exc
                self._changed.notify_all()

    def _next_batch(self) -> list[OutputFile]:
        """Return all files that wait, at least one; none when nothing is going to come."""
        with self._changed:
            while not self._waiting and not self._is_closing:
                self._changed.wait()
            batch, self._waiting = self._waiting, []
            return batch

    def _send(self, batch: list[OutputFile]) -> None:
        started = time.monotonic()
        paths = {file.name: self._folder.root / file.name for file in batch}
        before, total = len(self._folder.sent), len(self._plan.files)
        sent = self._store.add_weights(paths, before, total)
        for name, listed in sent.items():
            self.differing += self._before.get(name, listed) != listed
            self._folder.finish_sending(name, listed)
        nbytes = sum(file.nbytes for file in batch)
        seconds = time.monotonic() - started
        for file in batch:
            self._progress.file_sent(file.name, file.nbytes, seconds * file.nbytes / nbytes)
        with self._changed:
            self.room += nbytes
            self._changed.notify_all()

    def finish(self, last: Mapping[str, bytes]) -> PublishedCommit:
        """Wait until all weights are there, add what makes them a checkpoint, and check it all.

        That is the small files of the source, `last`, and the card; one that somebody else wrote
        stays.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(_TURN_S)  # with a time-out, so that signals are heard
        if self._error is not None:
            raise self._error
        carried = {name: self._folder.root / name for name in self._plan.side_files}
        small: dict[str, Path | bytes] = {**carried, **last}
        if RECORD_NAME in small:
            small[RECORD_NAME] = published_record(self._record)
        repository = self._store.card_for()
        if repository is not None:
            small.pop(CARD_NAME, None)
        if repository:
            small[CARD_NAME] = self._card(repository)
        check_sent(self._store.storage(), self._plan, self._folder.sent, small)
        return self._store.complete(small, self._folder.sent)

    @property
    def _record(self) -> dict[str, Any]:
        return record_of(self._plan, self._origin.record, __version__)

    def _card(self, repository: str) -> bytes:
        described = CardInputs(
            self._record,
            self._plan.config,
            self._origin.card,
            repository,
            self._plan.files[0].name,
        )
        return model_card(described).encode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Send no more; what is on its way may still arrive."""
        with self._changed:
            self._is_closing = True
            self._waiting = []
            self._changed.notify_all()
