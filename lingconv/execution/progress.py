"""The interface through which a run reports its progress."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lingconv.plans.plan import Plan


class Progress(Protocol):
    """Callbacks for the progress of a run; called from several threads."""

    def begin(self, plan: "Plan", done: int, jobs: int) -> None:
        """Called when a run starts; `done` files were finished by an earlier one."""

    def file_begins(self, name: str, nbytes: int, held: int) -> None:
        """Called when a file is opened for writing; `held` bytes are from an earlier run."""

    def advance(self, name: str, nbytes: int) -> None:
        """Called when `nbytes` of a file were written."""

    def file_ends(self, name: str, nbytes: int, seconds: float) -> None:
        """Called when a file is complete under its final name."""

    def sending(self, nbytes: int) -> None:
        """Called before the upload of files of `nbytes` in all."""

    def file_sent(self, name: str, nbytes: int, seconds: float) -> None:
        """Called when a file is uploaded."""


class Silent:
    """A Progress that does nothing."""

    def begin(self, plan: "Plan", done: int, jobs: int) -> None:
        """Ignore."""

    def file_begins(self, name: str, nbytes: int, held: int) -> None:
        """Ignore."""

    def advance(self, name: str, nbytes: int) -> None:
        """Ignore."""

    def file_ends(self, name: str, nbytes: int, seconds: float) -> None:
        """Ignore."""

    def sending(self, nbytes: int) -> None:
        """Ignore."""

    def file_sent(self, name: str, nbytes: int, seconds: float) -> None:
        """Ignore."""
