"""Who wants to know how a run goes on."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lingconv.plans.plan import Plan


class Progress(Protocol):
    """Hears how a run goes on; called from several threads."""

    def begin(self, plan: "Plan", done: int, jobs: int) -> None:
        """A run starts; `done` files were finished by an earlier one."""

    def file_begins(self, name: str, nbytes: int, held: int) -> None:
        """A file is opened for writing; an earlier run wrote `held` of its bytes."""

    def advance(self, name: str, nbytes: int) -> None:
        """Bytes of a file were written."""

    def file_ends(self, name: str, nbytes: int, seconds: float) -> None:
        """A file is complete under its final name."""

    def sending(self, nbytes: int) -> None:
        """Files of so many bytes are going to be sent to a repository."""

    def file_sent(self, name: str, nbytes: int, seconds: float) -> None:
        """A repository has a file."""


class Silent:
    """Progress that nobody watches."""

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
