"""Progress on stderr: bars on a terminal, lines in a log.

A row for the whole run, counted in bytes of output, and one for each file that is being written.
Finished files become lines. With `--json` everything that happens is a JSON object on a line.
`LINGCONV_PROGRESS=auto|bar|log|none` decides; auto looks at stderr.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO, cast

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from lingconv.cli.output_streams import RawStream
from lingconv.cli.terminal import terminal, wants_colour
from lingconv.cli.units import file_size, memory_size
from lingconv.cli.visible_text import visible
from lingconv.execution.progress import Progress, Silent
from lingconv.storage.machine import peak_resident_bytes
from lingconv.verification.progress import Unwatched, Watcher

if TYPE_CHECKING:
    from lingconv.plans.plan import Plan

_LOG_EVERY_S = 30.0
_EVENT_EVERY_S = 1.0
_SAMPLE_EVERY_S = 0.25
_SAMPLES = 20


class _Rate(ProgressColumn):
    """Speed in the same decimal units as the sizes."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{file_size(speed)}/s" if speed else "", style="progress.data.speed")


class _Amount(ProgressColumn):
    """Bytes done of bytes in all."""

    def render(self, task: Task) -> Text:
        done, total = file_size(task.completed), file_size(task.total or 0)
        if done.split()[1] == total.split()[1]:
            done = done.split()[0]
        return Text(f"{done}/{total}", style="progress.download", no_wrap=True)


class _Rates:
    """What a run does to the machine right now: memory, and the last seconds' speeds."""

    def __init__(self, plan: "Plan") -> None:
        self._read_per_written = plan.read_bytes / max(1, plan.write_bytes)
        self._samples = deque([(time.monotonic(), 0)], maxlen=_SAMPLES)
        self._written = 0

    def add(self, nbytes: int) -> bool:
        """Count written bytes; return whether it is time to show something new."""
        self._written += nbytes
        now = time.monotonic()
        if now - self._samples[-1][0] < _SAMPLE_EVERY_S:
            return False
        self._samples.append((now, self._written))
        return True

    def __str__(self) -> str:
        (then, before), (now, written) = self._samples[0], self._samples[-1]
        rate = (written - before) / max(now - then, 1e-9)
        read = rate * self._read_per_written
        return (
            f"mem {memory_size(peak_resident_bytes())}   read {file_size(read)}/s"
            f"   write {file_size(rate)}/s"
        )


class _BarsWithFooter(RichProgress):
    """Bars, and a line below them."""

    footer = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bars and the line."""
        yield from super().get_renderables()
        yield Text(self.footer)


def _live_console() -> Console:
    """Return a console on stderr whose control sequences pass."""
    stream = RawStream(sys.stderr)
    return Console(file=cast("TextIO", stream), no_color=not wants_colour(sys.stderr))


class Bars(Silent):
    """Live bars for a person."""

    def __init__(self) -> None:
        self._bars = _BarsWithFooter(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            _Amount(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_live_console(),
            transient=True,
        )
        self._lock = threading.Lock()
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def _print(self, line: str) -> None:
        """Print a line above the bars: as it is, for names are no markup."""
        self._bars.console.print(Text(visible(line)), soft_wrap=True)

    def begin(self, plan: "Plan", done: int, jobs: int) -> None:
        """Show the row of the whole run."""
        if done:
            self._print(_resuming(plan, done))
        self._print(_headline(plan))
        total = sum(file.nbytes for file in plan.files)
        self._rates = _Rates(plan)
        self._total = self._bars.add_task("total", total=total)
        self._bars.advance(self._total, _bytes_done(plan, done))

    def file_begins(self, name: str, nbytes: int, held: int) -> None:
        """Show a row for the file."""
        self._rows[name] = self._bars.add_task(visible(name), total=nbytes, completed=held)
        self._bars.advance(self._total, held)

    def advance(self, name: str, nbytes: int) -> None:
        """Move both bars.

        A worker may tell of its bytes when another has written the file's last ones, and it ended.
        """
        with self._lock:
            if name in self._rows:
                self._bars.advance(self._rows[name], nbytes)
            self._bars.advance(self._total, nbytes)
            if self._rates.add(nbytes):
                self._bars.footer = str(self._rates)

    def file_ends(self, name: str, nbytes: int, seconds: float) -> None:
        """Turn the file's row into a line."""
        with self._lock:
            self._bars.remove_task(self._rows.pop(name))
        self._print(_finished(name, nbytes, seconds))

    def sending(self, nbytes: int) -> None:
        """Show a row for what the Hub gets."""
        self._sent = self._bars.add_task("sent", total=nbytes)

    def file_sent(self, name: str, nbytes: int, seconds: float) -> None:
        """Move that row, and say so."""
        self._bars.advance(self._sent, nbytes)
        self._print(_sent(name, nbytes, seconds))


class Lines(Silent):
    """A line for each finished file, and a summary every 30 seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = self._spoken = time.monotonic()
        self._written = 0
        self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to put away."""

    def begin(self, plan: "Plan", done: int, jobs: int) -> None:
        """Note how much there is to do."""
        self._total = sum(file.nbytes for file in plan.files) - _bytes_done(plan, done)
        terminal.note(_headline(plan))
        if done:
            terminal.note(_resuming(plan, done))

    def file_begins(self, name: str, nbytes: int, held: int) -> None:
        """Say what an earlier run did of it."""
        if held:
            terminal.note(f"resuming {name}: {file_size(held)} of {file_size(nbytes)} are there")
            self._total -= held

    def advance(self, name: str, nbytes: int) -> None:
        """Speak up when it has been quiet for long."""
        with self._lock:
            self._written += nbytes
            now = time.monotonic()
            if now - self._spoken < _LOG_EVERY_S:
                return
            self._spoken = now
            rate = self._written / (now - self._started)
        left = (self._total - self._written) / rate
        terminal.note(
            f"{file_size(self._written)} of {file_size(self._total)} written,"
            f" {file_size(rate)}/s, {left:,.0f} s left"
        )

    def file_ends(self, name: str, nbytes: int, seconds: float) -> None:
        """Say that a file is complete."""
        terminal.note(_finished(name, nbytes, seconds))

    def sending(self, nbytes: int) -> None:
        """Note how much the Hub is to get."""
        self._unsent = nbytes

    def file_sent(self, name: str, nbytes: int, seconds: float) -> None:
        """Say that the Hub has a file, and how much it still lacks."""
        self._unsent -= nbytes
        terminal.note(f"{_sent(name, nbytes, seconds)}, {file_size(self._unsent)} to go")


class Events(Silent):
    """A JSON object for each thing that happens, a line of stderr each, for programs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spoken = time.monotonic()
        self._written = 0

    def begin(self, plan: "Plan", done: int, jobs: int) -> None:
        """Say what is going to be done."""
        total = sum(file.nbytes for file in plan.files)
        terminal.event("begin", source=plan.source, files=len(plan.files), bytes=total, done=done)

    def file_begins(self, name: str, nbytes: int, held: int) -> None:
        """Say that a file is opened."""
        terminal.event("file_begins", file=name, bytes=nbytes, held_bytes=held)

    def advance(self, name: str, nbytes: int) -> None:
        """Say once a second how much is written."""
        with self._lock:
            self._written += nbytes
            now = time.monotonic()
            if now - self._spoken < _EVENT_EVERY_S:
                return
            self._spoken = now
            written = self._written
        terminal.event("written", bytes=written, peak_rss_bytes=peak_resident_bytes())

    def file_ends(self, name: str, nbytes: int, seconds: float) -> None:
        """Say that a file is complete."""
        terminal.event("file_ends", file=name, bytes=nbytes, seconds=round(seconds, 3))

    def sending(self, nbytes: int) -> None:
        """Say how much the Hub is going to get."""
        terminal.event("sending", bytes=nbytes)

    def file_sent(self, name: str, nbytes: int, seconds: float) -> None:
        """Say that the Hub has a file."""
        terminal.event("file_sent", file=name, bytes=nbytes, seconds=round(seconds, 3))


def _headline(plan: "Plan") -> str:
    return f"{plan.source} -> {plan.options.layout}: {', '.join(plan.encodings)}"


def _finished(name: str, nbytes: int, seconds: float) -> str:
    rate = nbytes / seconds if seconds else 0.0
    return f"{name}  {file_size(nbytes)}  {file_size(rate)}/s"


def _sent(name: str, nbytes: int, seconds: float) -> str:
    return f"sent {_finished(name, nbytes, seconds)}"


def _resuming(plan: "Plan", done: int) -> str:
    return f"resuming: {done} of {len(plan.files)} files are finished"


def _bytes_done(plan: "Plan", done: int) -> int:
    """Return about how many bytes `done` files hold; which ones they are does not matter here."""
    return sum(file.nbytes for file in plan.files[:done])


class _Meter:
    """A Watcher for people: says what is being done, how far it is, and at which speed."""

    def __init__(self, verb: str, say: Callable[[str], None], every_s: float) -> None:
        self._verb = verb
        self._say = say
        self._every_s = every_s
        self._spoken = self._began = time.monotonic()
        self.stage("")

    def stage(self, name: str, nbytes: int = 0) -> None:
        """Begin a stage."""
        self._name, self._total, self._done = name, nbytes, 0
        self._began = time.monotonic()
        self._speak()

    def advance(self, nbytes: int) -> None:
        """Count bytes."""
        self._done += nbytes
        self._speak()

    def _speak(self) -> None:
        now = time.monotonic()
        if now - self._spoken < self._every_s:
            return
        self._spoken = now
        text = f"{self._verb} {self._name}"
        if self._total:
            rate = self._done / max(now - self._began, 1e-9)
            text += f"  {self._done / self._total:.0%} of {file_size(self._total)}"
            text += f"  {file_size(rate)}/s"
        self._say(f"{text}  mem {memory_size(peak_resident_bytes())}")


@contextmanager
def make_watcher(verb: str) -> Iterator[Watcher]:
    """Return the watcher that fits stderr and LINGCONV_PROGRESS: a live line, or one at times."""
    wanted = os.environ.get("LINGCONV_PROGRESS", "auto")
    if wanted == "none":
        yield Unwatched()
    elif wanted == "bar" or (wanted == "auto" and sys.stderr.isatty() and not terminal.quiet):
        with _live_console().status(verb) as status:
            yield _Meter(verb, lambda text: status.update(Text(visible(text))), _SAMPLE_EVERY_S)
    else:
        yield _Meter(verb, terminal.note, _LOG_EVERY_S)


def make_progress() -> AbstractContextManager[Progress]:
    """Return the progress that fits stderr and LINGCONV_PROGRESS."""
    wanted = os.environ.get("LINGCONV_PROGRESS", "auto")
    if wanted == "bar" or (wanted == "auto" and sys.stderr.isatty() and not terminal.quiet):
        return Bars()
    if wanted == "none":
        return nullcontext(Silent())
    return nullcontext(Events()) if terminal.json else Lines()
