"""Delivery of finished weight files: they are kept in the folder, or uploaded and deleted."""

from typing import Protocol

from lingconv.plans.plan import OutputFile


class Delivery(Protocol):
    """Takes finished files, and limits the disk that files take; called by several threads."""

    def has_room(self, file: OutputFile) -> bool:
        """Reserve disk for a file; return False, without reserving any, if there is too little.

        Raises the error of an earlier delivery that failed.
        """

    def wait(self) -> None:
        """Wait until there is more room, but only for a moment."""

    def deliver(self, file: OutputFile) -> None:
        """Called when a file is complete under its final name."""


class KeepLocal:
    """Keeps files in their folder; its free disk was checked before the run."""

    def has_room(self, file: OutputFile) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Return at once: there is always room."""

    def deliver(self, file: OutputFile) -> None:
        """Do nothing: the file is kept."""
