"""Processes that run a function or a command, forked from one that has everything imported."""

import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.kit.instants import Instant, Watch

# What stops a hang; nothing that is right takes a fraction of it.
GUARD_S = 600
PRELOADED = [
    "lingconv.api",
    "lingconv.cli.app",
    "lingconv.execution.pipeline.transcoder",
    "lingconv.execution.pipeline.averager",
    "gguf",
    "huggingface_hub.repocard",
    "torch",
    "tests.kit.warm",
]


@dataclass(frozen=True)
class Ending:
    """How a process ended: `exit_code` is the negative number of the signal that killed it.

    `trace` holds (event, subject) in order, `struck` how often each planned instant came; both are
    known of processes that were not killed.
    """

    exit_code: int
    value: Any = None
    trace: tuple[tuple[str, str], ...] = ()
    struck: Counter[Instant] = field(default_factory=Counter)
    peak_bytes: int = 0
    out: str = ""
    err: str = ""
    error: BaseException | None = None

    @property
    def killed(self):
        """Whether it ended by SIGKILL."""
        return self.exit_code == -signal.SIGKILL


@dataclass
class Child:
    """A process under way."""

    process: Any
    channel: Any
    folder: Any

    def reached(self):
        """Return once it is where `hold` makes it wait; raise when it ended before."""
        if not self.channel.poll(GUARD_S) or self.channel.recv() != "reached":
            self.process.kill()
            raise AssertionError(f"never there: {self._text('err')}")

    def go_on(self):
        """Let it go on from there."""
        self.channel.send("go on")

    def kill(self):
        """Kill it where it is."""
        self.process.kill()

    def send_signal(self, number):
        """Send a signal."""
        os.kill(self.process.pid, number)

    def end(self):
        """Wait for the end; raise what the function raised, and AssertionError for a hang."""
        ending = self.ending()
        if ending.error is not None:
            raise ending.error
        return ending

    def ending(self):
        """Wait for the end, and return what was raised with the rest."""
        self.process.join(GUARD_S)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it hangs: {self._text('err')}")
        told = {}
        try:
            while self.channel.poll():
                told = self.channel.recv()
        except EOFError:
            pass
        if not isinstance(told, dict):
            told = {}
        out, err = self._text("out"), self._text("err")
        self.folder.cleanup()
        self.channel.close()
        return Ending(self.process.exitcode, out=out, err=err, **told)

    def _text(self, stream):
        path = Path(self.folder.name, stream)
        return path.read_text() if path.exists() else ""


@cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _serve(channel, streams, environment, folder, plan, watch, work):
    """Run in the child: be what a new process would be, do it, and tell."""
    for stream, number in (("out", 1), ("err", 2)):
        target = os.open(Path(streams, stream), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    _take(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    told, code, watched = {}, 0, None
    try:
        watched = Watch(plan, watch, channel) if plan or watch else None
        function, args, words = pickle.loads(work)  # imports what reads the environment
        told["value"] = function(*args, **words)
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException as exc:
        traceback.print_exc()
        told["error"], code = _sendable(exc), 1
    if watched:
        told |= {"trace": tuple(watched.trace), "struck": watched.struck}
    told["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send(told)
    os._exit(code)


def _take(environment):
    """Have this environment, and have huggingface_hub read it again if it concerns it."""

    def concerns(variables):
        return {name: value for name, value in variables.items() if name.startswith("HF_")}

    if concerns(environment) != concerns(os.environ):
        for name in [*sys.modules]:
            if name.partition(".")[0] == "huggingface_hub":
                del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)


def _sendable(error):
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def start(function, *args, at=(), watch=(), environment=None, **words):
    """Begin to run `function(*args, **words)` in a process; return the Child.

    `at` is an Instant or several, `watch` the names of events for the trace, `environment` the one
    of the child, if not the test's own.
    """
    plan = (at,) if isinstance(at, Instant) else tuple(at)
    ours, theirs = _server().Pipe()
    folder = tempfile.TemporaryDirectory(prefix="child-")
    process = _server().Process(
        target=_serve,
        args=(
            theirs,
            folder.name,
            dict(os.environ if environment is None else environment),
            Path.cwd(),
            plan,
            tuple(watch),
            pickle.dumps((function, args, words)),
        ),
    )
    process.start()
    theirs.close()
    return Child(process, ours, folder)


def run(function, *args, **words):
    """Run `function(*args, **words)` in a process until it returns or is killed; return the Ending.

    Raises what the function raised, and AssertionError where it ended in another way.
    """
    ending = start(function, *args, **words).end()
    assert ending.exit_code == 0 or ending.killed, (ending.exit_code, ending.err)
    return ending


def command(*words, **how):
    """Run `lingconv words...` in a process to its end; return the Ending, with `out` and `err`.

    `how` is what `start` takes: `at`, `watch`, `environment`.
    """
    return start_command(*words, **how).end()


def start_command(*words, **how):
    """Begin to run `lingconv words...` in a process; return the Child."""
    return start(lingconv_main, [str(word) for word in words], **how)


def lingconv_main(words):
    """Do what `python -m lingconv words...` does."""
    from lingconv.cli import main

    sys.argv = ["lingconv", *words]
    main()
