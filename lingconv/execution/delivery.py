"""What becomes of a weight file once it is finished: it stays where it is, or it is sent away."""

from typing import Protocol

from lingconv.plans.plan import OutputFile


class Delivery(Protocol):
    """Takes finished files, and says whether there is room for more; called by several threads."""

    def has_room(self, file: OutputFile) -> bool:
        """Take the disk that a file needs; return False, and take none, when there is too little.

        Raises what went wrong with files that were delivered.
        """

    def wait(self) -> None:
        """Return after a moment, or when there is more room."""

    def deliver(self, file: OutputFile) -> None:
        """Take a file that is complete under its final name."""


class KeepLocal:
    """Files stay in their folder, whose disk was looked at before."""

    def has_room(self, file: OutputFile) -> bool:
        """Return that there is room."""
        return True

    def wait(self) -> None:
        """Return at once: nobody has to wait here."""

    def deliver(self, file: OutputFile) -> None:
        """Leave a file where it is."""
