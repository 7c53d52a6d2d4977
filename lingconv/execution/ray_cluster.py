"""The files of a plan as tasks of a Ray cluster, which sees source and target as this process does.

The driver claims the target and carries the small files; a task writes one weight file, the
largest first, with a lock and a journal of its own; the driver makes a checkpoint of them at the
end. What a lost worker or a whole lost node was at is done again by another, from where it was on
disk. When the driver dies, its tasks do too, and the same command goes on.

Where the target is a store, a repository or an object store, a task sends its file from the disk of
its node, and the driver notes what the store then has: no folder has to be seen by all nodes.
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
# A worker that was lost may hold its lock a little longer, on a file system of many machines.
_LOCK_PATIENCE_S = 120.0


class _Sending(NamedTuple):
    """The store that a task sends its file to, and the pull request where there is one."""

    uri: str
    options: PublishOptions
    pull_request: int
    total: int


class _Done(NamedTuple):
    """What a task took, and what the store that it sent its file to has now."""

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
    """Carry out `plan` on a cluster, as `engine.execute` does here; the bytes are the same.

    `store` is where `publish` sends to: its address, and how it is written to.

    Raises UsageError where Ray is not installed or not to be reached, and what tasks raise.
    """
    progress, resources = request.progress, request.resources
    started = time.monotonic()
    identity = run_identity(plan, __version__, commits or {}, headers_only=False)
    place, read = location_of(destination), files_read(plan, storages)
    with explained_writing(destination):
        if request.fresh:
            with RunFolder(place, identity, fresh=True, sources=read):
                pass  # alone, nobody may be writing what is removed
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
    """Connect to a cluster, or start one on this machine; a connection that is there is used."""
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
            f"no Ray cluster at `--address {address}`: {exc}",
            hint="leave `--address` out for one on this machine",
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
    """Have all files written, and sent where that is asked; the first error stops everything."""
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
    """Return what a task returned; raise what it raised."""
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
    """Write the file of `plan`, on whatever node this is, and send it where that is asked."""
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
    """Return where a task keeps its file until it is sent."""
    folder, name = location_of(destination)
    return folder / share / name if name else folder / share


def _send(file: OutputFile, folder: Path, number: int, sending: _Sending) -> ListedFile:
    """Send a finished file and remove it here; return what the store lists of it."""
    store = open_upload_target(sending.uri, sending.options)
    store.prepare(sending.pull_request)
    listed = store.add_weights({file.name: folder / file.name}, number, sending.total)
    gone = folder.with_name(f"{folder.name}-sent")  # at once: half a folder would be a stranger's
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
    return listed[file.name]
