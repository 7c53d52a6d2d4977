"""What a process does, counted, and what befalls it at the n-th time.

An `Event` names functions, and how to find in their arguments what they are called for: a path, or
an address. `Watch` puts a counter before each of them.
"""

import errno as codes
import fnmatch
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

BLOCK_BYTES = 4096


# -- what is called for what


def _path(call):
    """The file that a function gets first: a path, or an open file's number."""
    first = call.args[0]
    if not isinstance(first, int):
        return os.fspath(first)
    try:
        return str(Path(f"/proc/self/fd/{first}").readlink())
    except OSError:
        return ""


def _second(call):
    return os.fspath(call.args[1])


def _request(call):
    """`PUT /store/...`, of a Client of httpx and a request."""
    request = call.words.get("request") or call.args[1]
    return f"{request.method} {request.url.path}"


@dataclass(frozen=True)
class Event:
    """Functions, each by its name, and what returns the subject of a call to one of them.

    Only subjects that match `only` (as file names do) are counted.
    """

    functions: tuple[tuple[str, Callable[["Call"], str]], ...]
    only: str = "*"


def _event(*names, subject=_path, only="*"):
    return Event(tuple((name, subject) for name in names), only)


_WRITES = ("os.write", "os.pwrite", "os.writev", "os.pwritev")
EVENTS = {
    "read": _event("os.pread", "os.preadv"),
    "write": _event(*_WRITES),
    "journal": _event(*_WRITES, only="*/journal*.jsonl"),
    "open": _event("os.open"),
    "size": _event("os.ftruncate", "os.truncate"),
    "sync": _event("os.fsync", "os.fdatasync"),
    "rename": _event("os.rename", "os.replace", subject=_second),
    "remove": _event("os.unlink", "os.remove", "os.rmdir"),
    "lock": _event("fcntl.flock"),
    "request": _event("huggingface_hub.utils.httpx.Client.send", subject=_request),
    "commit": _event(
        "huggingface_hub.utils.httpx.Client.send", subject=_request, only="*/commit/*"
    ),
    "upload": _event(
        "huggingface_hub.utils.httpx.Client.send", subject=_request, only="PUT */store/*"
    ),
    "download": _event(
        "huggingface_hub.utils.httpx.Client.send", subject=_request, only="GET */cdn/*"
    ),
}
TORN = ("write", "journal")
FILES = ("write", "journal", "size", "sync", "rename", "remove")
HUB = ("request", "commit", "upload", "download")


# -- what happens then


@dataclass
class Call:
    """A call that is about to be made."""

    real: Callable[..., Any]
    args: tuple[Any, ...]
    words: dict[str, Any]
    watch: "Watch | None" = None
    subject: str = ""

    def __call__(self):
        """Make it."""
        return self.real(*self.args, **self.words)

    def half(self):
        """Make it for half of what it is to read or to write."""
        first, data, *rest = self.args
        return self.real(first, _half(data), *rest, **self.words)


def _half(data):
    if isinstance(data, (list, tuple)):
        return [_half(data[0])]
    if isinstance(data, int):
        return max(1, data // 2)
    # Past the page cache only whole blocks can be written.
    count = len(data) // 2
    return data[: count // BLOCK_BYTES * BLOCK_BYTES or max(1, count)]


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def KILL_BEFORE(call):
    """SIGKILL, and the call is not made."""
    _die()


def KILL_AFTER(call):
    """SIGKILL, once the call is made, whatever came of it."""
    with suppress(Exception):
        call()
    _die()


def KILL_WITHIN(call):
    """SIGKILL, once half of it is written: a torn line, a torn block."""
    with suppress(Exception):
        call.half()
    _die()


@dataclass(frozen=True)
class fail:
    """The call is not made, the system says `code`: ENOSPC, EIO ..."""

    code: int = codes.ENOSPC

    def __call__(self, call):
        raise OSError(self.code, os.strerror(self.code), call.subject)


def short(call):
    """Half is read or written, and that many bytes are returned."""
    return call.half()


@dataclass(frozen=True)
class send:
    """A signal to the process itself, then the call."""

    number: int

    def __call__(self, call):
        os.kill(os.getpid(), self.number)
        return call()


def hold(call):
    """Wait there until the test says `go_on`; it hears of it by `reached`."""
    call.watch.wait_for_test()
    return call()


@dataclass(frozen=True)
class Instant:
    """The `number`-th time (1 is the first) of an event whose subject matches `only`; and `then`.

    With `times`, that also befalls the calls that follow.
    """

    event: str
    number: int
    then: Callable[[Call], Any] = KILL_BEFORE
    only: str = "*"
    times: float = 1


def counts(trace):
    """Return how often each event came."""
    return Counter(event for event, _ in trace)


def sample(times, count, rng):
    """Choose instants to be killed at by a seed, as many of each event as of any other.

    `times` says how often each event comes at least: `counts` of a trace. Returns instants that are
    all different; raises ValueError where there are not so many.
    """
    possible = {}
    for event, often in sorted(times.items()):
        kills = (KILL_BEFORE, KILL_AFTER, *([KILL_WITHIN] if event in TORN else []))
        of_event = [Instant(event, n, kill) for n in range(1, often + 1) for kill in kills]
        possible[event] = rng.sample(of_event, len(of_event))
    chosen = []
    while len(chosen) < count:
        left = [event for event in possible if possible[event]]
        if not left:
            raise ValueError(f"there are only {len(chosen)} instants")
        chosen += [possible[event].pop() for event in left]
    return rng.sample(chosen[:count], count)


# -- who counts


@dataclass
class Watch:
    """Counts events of this process, and lets happen what was planned; never taken off again."""

    plan: tuple[Instant, ...]
    events: tuple[str, ...]
    channel: Any = None
    trace: list[tuple[str, str]] = field(default_factory=list)
    struck: Counter[Instant] = field(default_factory=Counter)

    def __post_init__(self):
        self._lock = threading.Lock()
        self._seen: Counter[Instant] = Counter()
        wanted = {*self.events, *(instant.event for instant in self.plan)}
        concerned = {}
        for event in sorted(wanted):
            for name, subject in EVENTS[event].functions:
                concerned.setdefault((name, subject), []).append(event)
        for (name, subject), events in concerned.items():
            self._put_before(name, subject, events)

    def _put_before(self, name, subject, events):
        owner, _, last = name.rpartition(".")
        owner = resolve_name(owner)
        real = getattr(owner, last, None)
        if real is None:
            return  # this system does not have it

        def watched(*args, **words):
            call = Call(real, args, words, self)
            call.subject = subject(call)
            return self._meet(call, events)

        setattr(owner, last, watched)

    def _meet(self, call, events):
        with self._lock:
            then = None
            for event in events:
                if fnmatch.fnmatch(call.subject, EVENTS[event].only):
                    self.trace.append((event, call.subject))
                    then = self._due(event, call.subject) or then
        return then(call) if then else call()

    def _due(self, event, subject):
        then = None
        for instant in self.plan:
            if instant.event == event and fnmatch.fnmatch(subject, instant.only):
                self._seen[instant] += 1
                if 0 <= self._seen[instant] - instant.number < instant.times:
                    self.struck[instant] += 1
                    then = instant.then
        return then

    def wait_for_test(self):
        """Tell the test that we are there, and wait for its word."""
        self.channel.send("reached")
        self.channel.recv()
