"""Execution on a Ray cluster: each weight file is a task.

Source and target must be visible to all nodes. The driver locks the target and copies the small
files; a task writes one weight file, the largest first, with a lock and a journal of its own; the
driver writes the closing files. Ray reschedules the tasks of a lost worker or node, and they
resume from the journal. When the driver dies, its tasks do too; the same command resumes.

If the target is a repository or an object store, a task uploads its file from the disk of its node,
and the driver journals it: no folder has to be shared by the nodes.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lingconv.errors import (
    SAME_COMMAND,
    LingconvError,
    Locked,
    ResourceError,
    UsageError,
    resumable,
)
from lingconv.execution.devices import CPU
from lingconv.execution.engine import (
    Publish,
    Result,
    carry_side_files,
    execute,
    files_read,
    unfinished,
    write_share,
)
from lingconv.execution.progress import Progress
from lingconv.execution.request import RunRequest
from lingconv.execution.resources import Resources
from lingconv.execution.run_folder import RunFolder, location_of
from lingconv.execution.run_identity import run_identity
from lingconv.plans.plan import OutputFile, Plan
from lingconv.storage import Storage
from lingconv.storage.local_output import explained_writing
from lingconv.storage.locations import open_storage, open_upload_target
from lingconv.storage.upload_target import ListedFile, PublishOptions
from lingconv.version import __version__

_THREADS = 2  # of a task: one fills, one writes
_RETRIES = 5
_LOOK_EVERY_S = 0.5
# A lost worker's lock may outlive the worker for a while on a network file system.
_LOCK_PATIENCE_S = 120.0


class _Sending(NamedTuple):
    """The store to which a task uploads its file, and the pull request (0 if none)."""

    uri: str
    options: PublishOptions
    pull_request: int
    total: int


class _Done(NamedTuple):
    """The duration of a task, and the uploaded file as the store lists it."""

    seconds: float
    sent: ListedFile | None = None


def execute_on_ray(
    plan: Plan,
    storages: Sequence[Storage],
    destination: Path,
    request: RunRequest,
    *,
    commits: Mapping[str, str] | None = None,
    publish: Publish | None = None,
    store: tuple[str, PublishOptions] | None = None,
) -> Result:
    """Execute `plan` on a cluster; the output has the same bytes as `engine.execute`'s.

    `store` is the store of `publish`: its address and options.

    Raises UsageError if Ray is not installed or cannot be reached, and the errors of tasks.
    """
    progress, resources = request.progress, request.resources
    started = time.monotonic()
    identity = run_identity(plan, __version__, commits or {}, headers_only=False)
    place, read = location_of(destination), files_read(plan, storages)
    with explained_writing(destination):
        if request.fresh:
            with RunFolder(place, identity, fresh=True, sources=read):
                pass  # under an exclusive lock: no task may write files that are being removed
        with (
            RunFolder(place, identity, fresh=False, share="driver", sources=read) as folder,
            ExitStack() as stack,
        ):
            publisher = stack.enter_context(publish(folder, progress)) if publish else None
            todo = publisher.begin() if publisher else unfinished(plan.files, folder)
            carry_side_files(plan, storages, folder)
            progress.begin(plan, len(plan.files) - len(todo), len(todo))
            sending = None
            if publisher and store:
                sending = _Sending(*store, publisher.pull_request, len(plan.files))
            if todo:
                stack.enter_context(resumable())
                stack.enter_context(_cluster(resources.address))
                _run_tasks(plan, todo, identity, folder, destination, resources, progress, sending)
    done = execute(plan, storages, destination, commits=commits, publish=publish)
    return replace(
        done,
        files_written=len(todo),
        files_found_finished=len(plan.files) - len(todo),
        bytes_written=sum(file.nbytes for file in todo),
        seconds=time.monotonic() - started,
    )


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine; an existing connection is used."""
    if find_spec("ray") is None:
        raise UsageError("Ray is not installed", hint="pip install 'lingconv[ray]'")
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(
            address=address or None,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as exc:
        raise UsageError(
            f"no Ray cluster at `address={address}`: {exc}",
            hint="leave `address` out for one on this machine",
        ) from exc
    try:
        yield
    finally:
        ray.shutdown()


def _run_tasks(
    plan: Plan,
    todo: Sequence[OutputFile],
    identity: Mapping[str, Any],
    folder: RunFolder,
    destination: Path,
    resources: Resources,
    progress: Progress,
    sending: _Sending | None,
) -> None:
    """Run a task for each file, which may upload it; the first error stops all tasks."""
    import ray

    threads = resources.jobs or _THREADS
    gpus = 0 if resources.device == CPU else 1
    write = ray.remote(num_cpus=max(1, threads // 2), num_gpus=gpus, max_retries=_RETRIES)(
        _write_file
    )
    shared: Any = ray.put((plan.sources, dict(identity), sending))
    own = replace(resources, jobs=threads)
    numbers = {file.name: number for number, file in enumerate(plan.files)}
    bare = replace(plan, files=(), sources=(), dropped=(), side_files={}, warnings=())
    waiting = {}
    for file in sorted(todo, key=lambda file: -file.nbytes):
        one, number = replace(bare, files=(file,)), numbers[file.name]
        task = write.remote(one, shared, str(destination), number, own)
        waiting[task] = file
    try:
        while waiting:
            ready, _ = ray.wait([*waiting], timeout=_LOOK_EVERY_S)
            for task in ready:
                file = waiting.pop(task)
                done = _result_of(task, file)
                progress.file_begins(file.name, file.nbytes, 0)
                progress.advance(file.name, file.nbytes)
                progress.file_ends(file.name, file.nbytes, done.seconds)
                if done.sent is not None:
                    folder.finish_sending(file.name, done.sent)
                    progress.file_sent(file.name, file.nbytes, done.seconds)
    finally:
        for task in waiting:
            with suppress(ray.exceptions.RayError, ValueError):
                ray.cancel(task, force=True)


def _result_of(task: Any, file: OutputFile) -> _Done:
    """Return the result of a task; raises the task's error."""
    import ray

    try:
        return _Done(*ray.get(task))
    except ray.exceptions.RayTaskError as exc:
        cause = exc.cause
        raise (cause if isinstance(cause, LingconvError) else exc) from exc
    except ray.exceptions.RayError as exc:
        raise ResourceError(
            f"{file.name}: the cluster lost {_RETRIES + 1} workers that were writing it"
            f" ({type(exc).__name__})",
            hint=f"look at the cluster, then {SAME_COMMAND}",
        ) from exc


def _write_file(
    plan: Plan,
    shared: tuple[Any, Mapping[str, Any], _Sending | None],
    destination: str,
    number: int,
    resources: Resources,
) -> _Done:
    """Write the only file of `plan` on this node, and upload it if the target is a store."""
    started = time.monotonic()
    share = f"file-{number}"
    sources, identity, sending = shared
    storages = [open_storage(source.uri)[0] for source in sources]
    whole = replace(plan, sources=sources)
    own = _own(Path(destination), share) if sending else Path(destination)
    while True:
        try:
            write_share(whole, identity, storages, own, share, resources)
        except Locked:
            if time.monotonic() - started > _LOCK_PATIENCE_S:
                raise
            time.sleep(1.0)
        else:
            break
    sent = None
    if sending:
        sent = _send(plan.files[0], location_of(own).folder, number, sending)
    return _Done(time.monotonic() - started, sent)


def _own(destination: Path, share: str) -> Path:
    """Return the folder of a task's file until it is uploaded."""
    folder, name = location_of(destination)
    return folder / share / name if name else folder / share


def _send(file: OutputFile, folder: Path, number: int, sending: _Sending) -> ListedFile:
    """Upload a finished file and remove it here; return the file as the store lists it."""
    store = open_upload_target(sending.uri, sending.options)
    store.prepare(sending.pull_request)
    listed = store.add_weights({file.name: folder / file.name}, number, sending.total)
    gone = folder.with_name(f"{folder.name}-sent")  # renamed first: half a folder would be refused
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
    return listed[file.name]
