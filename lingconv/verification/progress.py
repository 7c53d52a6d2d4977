"""progress."""

from typing import Protocol


class Watcher(Protocol):
    """Hears how a proof goes on."""

    def stage(self, name: str, nbytes: int = 0) -> None:
        """A stage begins, in which `nbytes` are going to be read (0: unknown)."""

    def advance(self, nbytes: int) -> None:
        """Bytes of the stage were read."""


class Unwatched:
    """A Watcher that ignores everything."""

    def stage(self, name: str, nbytes: int = 0) -> None:
        """Ignore."""

    def advance(self, nbytes: int) -> None:
        """Ignore."""
