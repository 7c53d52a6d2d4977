"""Where a run writes to: a folder, a GGUF file, or a repository by way of a staging folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lingconv import engine
from lingconv.devices import gpus_of
from lingconv.engine import Publish, Resources, Result
from lingconv.errors import DestinationError, UsageError
from lingconv.hub.address import HubAddress, is_hub, parse_address, staging_folder
from lingconv.journal import RunFolder, pinned_commits
from lingconv.model import Model
from lingconv.options import PublishOptions
from lingconv.plan import Plan
from lingconv.progress import Progress

if TYPE_CHECKING:
    from lingconv.hub.publisher import Publisher


class Destination:
    """Where a run writes to, what it may do there, and which commits it reads."""

    def __init__(
        self,
        destination: str | Path,
        resources: Resources | None = None,
        publish: PublishOptions | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        self._resources = resources or Resources()
        self._fresh = fresh
        self._options = publish or PublishOptions()
        self._options.check()
        self._address: HubAddress | None = None
        if is_hub(destination):
            self._address = parse_address(str(destination))
            self._folder = staging_folder(self._address, self._resources.staging)
        else:
            self._folder = Path(destination)
            if self._options != PublishOptions():
                raise UsageError(
                    "`--create`, `--public`, `--pr` and `--replace` are for repositories",
                    hint="let DST be `hf://org/name`",
                )
        self._earlier = {} if fresh else pinned_commits(self._folder)
        self._commits: dict[str, str] = {}
        self._check_executor()
        if self._resources.part is not None:
            self._refuse_in_parts(fresh=fresh)

    def pinned(self, source: str | Path) -> str:
        """Return a source; one on the Hub at the commit that this run, or an earlier one, reads."""
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

    def _check_executor(self) -> None:
        """Raise UsageError for an executor that is none, or cannot do what is asked."""
        known = (engine.LOCAL, engine.RAY)
        if self._resources.executor not in known:
            raise UsageError(
                f"`--executor {self._resources.executor}`", hint=f"one of {', '.join(known)}"
            )
        on_ray = self._resources.executor == engine.RAY
        if not on_ray:  # the nodes of a cluster look for themselves
            gpus_of(self._resources.device)
        if self._resources.address and not on_ray:
            raise UsageError("`--address` is that of a cluster: add `--executor ray`")
        if on_ray and (self._address is not None or self._resources.part is not None):
            raise UsageError(
                "a cluster writes whole targets to a folder that all its nodes see",
                hint="leave `--part` out; to publish, `lingconv push` the folder",
            )

    def _refuse_in_parts(self, *, fresh: bool) -> None:
        """Refuse what parts of a run cannot do."""
        if self._address is not None:
            raise UsageError(
                "`--part` writes to a folder that all machines see, not to a repository",
                hint="then `lingconv finish` and `lingconv push` it",
            )
        if fresh:
            raise UsageError(
                "`--fresh` would remove what other parts have written",
                hint="remove the folder before the first part starts",
            )

    def _refuse_overlap(self, source: str) -> None:
        """Refuse to write into a source."""
        if is_hub(source) or self._address is not None:
            return
        inner, outer = self._folder.resolve(), Path(source).resolve()
        if inner == outer or outer in inner.parents:
            raise DestinationError(
                f"{self._folder} is inside the source {source}", hint="choose a folder of its own"
            )

    def disk(self, plan: Plan) -> tuple[Path, int]:
        """Return the folder where a run keeps what it writes, and the most bytes there."""
        publishes = self._address is not None
        return self._folder, engine.disk_needed(plan, self._resources, publishes=publishes)

    def execute(
        self,
        plan: Plan,
        models: Sequence[Model],
        progress: Progress | None,
    ) -> Result:
        """Carry out a plan that reads `models`."""
        storages = [model.checkpoint.storage for model in models]
        if self._resources.executor == engine.RAY:
            from lingconv.executors.ray import execute_on_ray

            return execute_on_ray(
                plan,
                storages,
                self._folder,
                resources=self._resources,
                progress=progress,
                fresh=self._fresh,
                commits=self._commits,
            )
        return engine.execute(
            plan,
            storages,
            self._folder,
            resources=self._resources,
            progress=progress,
            fresh=self._fresh,
            commits=self._commits,
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


def _commit_now(address: HubAddress) -> str:
    """Return the commit that an address stands for; empty where there is no network to ask."""
    from lingconv.hub import remote  # with huggingface_hub

    return "" if remote.is_offline() else remote.find_commit(address)
