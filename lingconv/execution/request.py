"""`RunRequest`: how a plan is to be carried out, as one value."""

from dataclasses import dataclass, field

from lingconv.execution.progress import Progress, Silent
from lingconv.execution.resources import Resources
from lingconv.storage.upload_target import PublishOptions


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a run may use, who hears of it, and what it may do to its target.

    `fresh` removes what an earlier run wrote there. `recheck` compares every finished file with
    what the plan gives, and writes what differs again. `publish` says how a repository is written
    to. Nothing of it changes a byte of the output.
    """

    resources: Resources = field(default_factory=Resources)
    progress: Progress = field(default_factory=Silent)
    fresh: bool = False
    recheck: bool = False
    publish: PublishOptions = field(default_factory=PublishOptions)

    @classmethod
    def of(
        cls,
        resources: Resources | None = None,
        progress: Progress | None = None,
        publish: PublishOptions | None = None,
        *,
        fresh: bool = False,
        recheck: bool = False,
    ) -> "RunRequest":
        """Return the request of a function's keywords, None standing for the default."""
        return cls(
            resources or Resources(),
            progress or Silent(),
            fresh,
            recheck,
            publish or PublishOptions(),
        )
