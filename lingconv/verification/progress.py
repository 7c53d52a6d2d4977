"""The interface through which a verification reports its progress."""

from typing import Protocol


class Watcher(Protocol):
    """Callbacks for the progress of a verification."""

    def stage(self, name: str, nbytes: int = 0) -> None:
        """Called when a stage begins, in which `nbytes` are going to be read (0: unknown)."""

    def advance(self, nbytes: int) -> None:
        """Called when `nbytes` of the stage were read."""


class Unwatched:
    """A Watcher that does nothing."""

    def stage(self, name: str, nbytes: int = 0) -> None:
        """Ignore."""

    def advance(self, nbytes: int) -> None:
        """Ignore."""
