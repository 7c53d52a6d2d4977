"""stdout and stderr as the command line uses them: nothing raw, and no end to a run by them."""

import errno
import os
import sys
from io import TextIOWrapper
from typing import Any, TextIO

from lingconv.cli.visible_text import filtered
from lingconv.errors import ResourceError


class OutputStream:
    """A text stream in front of another one, which may be full, or lose its reader.

    A reader that goes away (`| head`) is nobody's fault: what more comes is for nobody, and the
    command goes on to its own exit code. Any other failure of stdout loses a result, and raises
    ResourceError; stderr's is not worth a run.
    """

    def __init__(self, stream: TextIO, *, holds_results: bool) -> None:
        self._stream = stream
        self._holds_results = holds_results

    def write(self, text: str) -> int:
        """Write what can be shown; libraries print here too."""
        return self.write_raw(filtered(text))

    def write_raw(self, text: str) -> int:
        """Write control sequences: the bars' own."""
        try:
            return self._stream.write(text)
        except OSError as exc:
            self._give_up(exc)
            return len(text)

    def flush(self) -> None:
        """Hand over what is held back."""
        try:
            self._stream.flush()
        except OSError as exc:
            self._give_up(exc)

    def _give_up(self, error: OSError) -> None:
        # What is held back would fail once more when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._holds_results and error.errno != errno.EPIPE:
            raise ResourceError(
                f"the result cannot be written to stdout: {error.strerror}",
                hint="make room where stdout goes to, or name another place",
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RawStream:
    """What live bars write to: the same stream, with its control sequences."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text as it is."""
        write = getattr(self._stream, "write_raw", self._stream.write)
        return int(write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_standard_streams() -> None:
    """Make sys.stdout and sys.stderr streams that take any text and survive their readers.

    Closed ones are opened on nothing: else the next file that is opened would be stdout.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdout = _stream(sys.stdout, 1)
    sys.stderr = _stream(sys.stderr, 2)


def _stream(stream: TextIO | None, descriptor: int) -> OutputStream:
    if stream is None:  # Python found it closed
        stream = os.fdopen(descriptor, "w", closefd=False)
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return OutputStream(stream, holds_results=descriptor == 1)
