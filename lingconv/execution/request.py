"""`RunRequest`: everything that a caller asks of an execution besides the plan, as one value."""

from dataclasses import dataclass, field

from lingconv.execution.progress import Progress, Silent
from lingconv.execution.resources import Resources
from lingconv.storage.upload_target import PublishOptions


@dataclass(frozen=True, slots=True)
class RunRequest:
    """The resources of a run, its progress callbacks, and how it treats its target.

    `fresh` removes the files of an earlier run. `recheck` compares every finished file with the
    bytes that the plan gives, and writes those that differ again; for a repository all files are
    written again, and those sent whose digest is not the listed one. `publish` are the options of
    an upload. None of them changes a byte of the output.
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
        """Return the request with these values; None means the default."""
        return cls(
            resources or Resources(),
            progress or Silent(),
            fresh,
            recheck,
            publish or PublishOptions(),
        )
