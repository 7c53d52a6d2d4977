"""Every error that lingconv raises on purpose, and the exit code that each one means.

    LingconvError
    |-- UsageError            2  the request itself is wrong (option, pattern, recipe, family file)
    |-- CheckpointError       3  the source cannot be trusted; carries the list of faults
    |-- PermissionDenied      4  not allowed to read the source or write the target
    |-- NetworkError          5  the Hub or the way to it failed, again and again; nothing is lost
    |-- ResourceError         6  not enough disk or memory
    |-- DestinationError      7  the target holds something else
    |   `-- Locked            7  or somebody else is writing it right now
    `-- Interrupted         130  stopped by a signal; the same command resumes

A message says what is wrong and where; `hint` says what to do. Anything outside this tree is a bug.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# The hint of every error that leaves a target to be resumed.
SAME_COMMAND = "run the same command again: it goes on where it stopped"


# The kind of faults that name a config key which changes what is computed, and is not understood.
MATHEMATICS = "mathematics"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong or odd in a checkpoint.

    `kind` groups faults of one sort; `fatal` faults stop a conversion, others are only reported.
    """

    kind: str
    message: str
    file: str = ""
    tensor: str = ""
    fatal: bool = True
    hint: str = ""

    def __str__(self) -> str:
        """Return the fault on one line: where, then what."""
        where = ": ".join(part for part in (self.file, self.tensor) if part)
        return f"{where}: {self.message}" if where else self.message

    def with_hint(self, shared: str = "") -> str:
        """Return the fault on one line, its hint behind it unless it is one that all share."""
        return f"{self} ({self.hint})" if self.hint and self.hint != shared else str(self)


def shared_hint(faults: Sequence[Fault]) -> str:
    """Return the hint that all faults have; empty where it is another one for each, or none."""
    hints = {fault.hint for fault in faults}
    return hints.pop() if len(hints) == 1 else ""


class LingconvError(Exception):
    """Base of the tree: `details` are indented lines below the message, `hint` is the way out."""

    exit_code = 70

    def __init__(self, message: str, *, hint: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error travel from process to process with all that it says."""
        return _rebuilt, (type(self), self.message, self.hint, self.details)


def _rebuilt(
    kind: type[LingconvError], message: str, hint: str, details: Sequence[str]
) -> LingconvError:
    return kind(message, hint=hint, details=details)


class UsageError(LingconvError):
    """The request cannot be carried out as written."""

    exit_code = 2


class CheckpointError(LingconvError):
    """The source checkpoint is broken, inconsistent or not understood."""

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        faults: Sequence[Fault] = (),
        hint: str = "",
        details: Sequence[str] = (),
    ) -> None:
        shared = shared_hint(faults)
        super().__init__(
            message,
            hint=hint or shared,
            details=details or [fault.with_hint(shared) for fault in faults],
        )
        self.faults = tuple(faults)


def unusable(uri: str, faults: Sequence[Fault]) -> CheckpointError:
    """Return the error of a checkpoint that is refused for these faults of it."""
    plural = "s" if len(faults) > 1 else ""
    return CheckpointError(f"{uri} has {len(faults)} fault{plural}", faults=faults)


class PermissionDenied(LingconvError):
    """The operating system, or the Hub, refused access."""

    exit_code = 4


class NetworkError(LingconvError):
    """The Hub or the way to it failed, and went on failing; the same command goes on."""

    exit_code = 5


class ResourceError(LingconvError):
    """Disk or memory does not suffice."""

    exit_code = 6


class DestinationError(LingconvError):
    """The target directory belongs to something else."""

    exit_code = 7


class Locked(DestinationError):
    """Somebody else is writing the target right now."""


class Interrupted(LingconvError):
    """A signal stopped the run between two strips; nothing that was finished is lost."""

    exit_code = 130


@contextmanager
def resumable() -> Iterator[None]:
    """Say of a run that a signal stops, wherever it is just then, that it can go on."""
    try:
        yield
    except KeyboardInterrupt as exc:
        raise Interrupted("interrupted", hint=SAME_COMMAND) from exc
