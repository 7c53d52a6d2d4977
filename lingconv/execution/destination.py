"""The destination of a run: a folder, a GGUF file, or a remote store with a staging folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.errors import DestinationError, UsageError
from lingconv.execution import engine
from lingconv.execution.devices import gpus_of
from lingconv.execution.engine import Publish, Result
from lingconv.execution.progress import Progress
from lingconv.execution.request import RunRequest
from lingconv.execution.resources import LOCAL, RAY
from lingconv.execution.run_folder import RunFolder, pinned_commits
from lingconv.plans.plan import Plan
from lingconv.storage import Storage
from lingconv.storage.hub.address import HubAddress, is_hub, parse_address
from lingconv.storage.locations import is_object, is_remote, open_upload_target, staging_folder_of
from lingconv.storage.provenance import read_source_record
from lingconv.storage.upload_target import PublishOptions

if TYPE_CHECKING:
    from lingconv.execution.publishing.publisher import Publisher


class Destination:
    """The destination of a run, the options that apply to it, and the commits that it reads."""

    def __init__(
        self,
        destination: str | Path,
        request: RunRequest | None = None,
    ) -> None:
        self._request = request or RunRequest()
        self._resources = self._request.resources
        self._options = self._request.publish
        self._options.check()
        self._store = str(destination) if is_remote(destination) else ""
        if self._store:
            self._folder = staging_folder_of(self._store, self._resources.staging)
        else:
            self._folder = Path(destination)
        self._check_options()
        self._earlier = {} if self._request.fresh else pinned_commits(self._folder)
        self._commits: dict[str, str] = {}
        self._check_executor()
        if self._resources.part is not None:
            self._refuse_in_parts()

    def pinned(self, source: str | Path) -> str:
        """Return a source's address, pinned to a commit if it is on the Hub.

        An earlier run's commit is used again.
        """
        name = str(source)
        self._refuse_overlap(name)
        if not is_hub(name):
            return name
        address = parse_address(name)
        commit = self._earlier.get(name) or _commit_now(address)
        if not commit:
            return name
        self._commits[name] = commit
        return str(address._replace(revision=commit))

    def _check_options(self) -> None:
        """Raise UsageError for options that do not apply to this kind of target."""
        if is_object(self._store) and self._request.recheck:
            raise UsageError(
                "`recheck` compares digests, and object stores list none that all clients make",
                hint="leave it out; `lingconv verify SRC DST` compares what the store holds",
            )
        replaces = self._options == PublishOptions(replace=True)
        if is_hub(self._store) or self._options == PublishOptions():
            return
        if not (replaces and self._store):
            raise UsageError(
                "`create`, `public` and `pull_request` are for repositories, `replace` for them and"
                " object stores",
                hint="let DST be `hf://org/name`",
            )

    def _check_executor(self) -> None:
        """Raise UsageError for an unknown executor, or for options that it does not support."""
        known = (LOCAL, RAY)
        if self._resources.executor not in known:
            raise UsageError(
                f"`executor={self._resources.executor}`", hint=f"one of {', '.join(known)}"
            )
        on_ray = self._resources.executor == RAY
        if not on_ray:  # each node of a cluster checks its own GPUs
            gpus_of(self._resources.device)
        if self._resources.address and not on_ray:
            raise UsageError("`address` is that of a cluster: add `executor=ray`")
        if on_ray and self._resources.part is not None:
            raise UsageError("a cluster writes whole targets", hint="leave `part` out")
        if on_ray and self._request.recheck:
            raise UsageError(
                "`recheck` reads finished files on one machine, not on a cluster",
                hint="leave `executor` out: the same command then goes on here",
            )

    def _refuse_in_parts(self) -> None:
        """Raise UsageError for options that cannot be combined with `--part`."""
        if self._store:
            raise UsageError(
                "`part` writes to a folder that all machines see, not to a store",
                hint="then `lingconv finish` and `lingconv push` it; or take `executor=ray`",
            )
        if self._request.fresh:
            raise UsageError(
                "`fresh` would remove what other parts have written",
                hint="remove the folder before the first part starts",
            )

    def _refuse_overlap(self, source: str) -> None:
        """Raise DestinationError if the destination is inside the source."""
        if is_remote(source) or self._store:
            inside = is_object(source) and f"{self._store}/".startswith(source.rstrip("/") + "/")
            if inside:
                raise DestinationError(
                    f"{self._store} is inside the source {source}", hint="choose another folder"
                )
            return
        inner, outer = self._folder.resolve(), Path(source).resolve()
        if inner == outer or outer in inner.parents:
            raise DestinationError(
                f"{self._folder} is inside the source {source}", hint="choose a folder of its own"
            )

    def disk(self, plan: Plan) -> tuple[Path, int]:
        """Return the folder of a run's files on disk, and the most bytes that they take."""
        publishes = bool(self._store)
        return self._folder, engine.disk_needed(plan, self._resources, publishes=publishes)

    def execute(
        self,
        plan: Plan,
        models: Sequence[Model],
    ) -> Result:
        """Execute a plan that reads `models`, here or on a cluster."""
        storages = [model.checkpoint.storage for model in models]
        if self._resources.executor == RAY:
            from lingconv.execution.ray_cluster import execute_on_ray

            return execute_on_ray(
                plan,
                storages,
                self._folder,
                self._request,
                commits=self._commits,
                publish=self._publish(plan, storages[-1]),
                store=(self._store, self._options) if self._store else None,
            )
        return engine.execute(
            plan,
            storages,
            self._folder,
            self._request,
            commits=self._commits,
            publish=self._publish(plan, storages[-1]),
        )

    def _publish(self, plan: Plan, base: Storage) -> Publish | None:
        if not self._store:
            return None
        share = self._resources.disk_share(publishes=True)

        def begin(folder: RunFolder, progress: Progress) -> "Publisher":
            from lingconv.execution.publishing.publisher import Origin, Publisher

            store = open_upload_target(self._store, self._options)
            origin = Origin(read_source_record(base), engine.base_card(plan, base))
            return Publisher(store, self._options, plan, origin, folder, progress, share)

        return begin


def _commit_now(address: HubAddress) -> str:
    """Return the commit of a Hub address; empty if offline."""
    from lingconv.storage.hub import files as remote  # imports huggingface_hub

    return "" if remote.is_offline() else remote.find_commit(address)
