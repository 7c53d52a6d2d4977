"""Conversions in processes of their own, in which something happens at a stated instant.

A test says what happens when: "killed before the third fsync", "no space left at the tenth write of
a weight file". The process itself counts what it does and strikes when it is there. Nothing waits
for a clock, so that a plan comes true on any machine, however busy it is; a plan that does not
come true is a failure, never a smaller test.

    from tests.kit import FILES, KILL_AFTER, Instant, counts, run, sample

    quiet = run(convert, source, target, watch=FILES)       # what happens, and in which order
    quiet.value, quiet.trace                                # ... and what `convert` returned
    for instant in sample(counts(quiet.trace), 20, rng):    # 20 instants of those, by a seed
        assert run(convert, source, other, at=instant).killed
        (other / "model-00001-of-00014.safetensors").unlink(missing_ok=True)
        assert run(convert, source, other, at=Instant("rename", 2, KILL_AFTER)).killed
        run(convert, source, other)                         # raises what the conversion raises
        assert tree_digest(other) == tree_digest(target)

`run` takes a function of a module (its arguments travel by pickle), `command` the words of a
command line, `start` and `start_command` either without waiting for the end. They are forked from
one server, which has lingconv, numba and torch imported: a process costs some hundredths of a
second. It gets the environment and the working directory of the test as they are then, and nothing
that was patched in the test's own process: the function itself patches what it needs.

An instant without a kill is proven by `Ending.struck`: a test asserts that its fault was met.

Events are what the operating system is asked for (`instants.EVENTS`), with the path or the address
that it is asked about, so that instants say nothing of lingconv's own functions. A table of states
needs no more than tuples of instants and of what is done to the folder between them. More events:
`EVENTS["name"] = Event(("module.function", subject), ...)`.

With several jobs, threads take turns as they please, and which of two files is renamed first may
differ from run to run. How often something happens may differ too, then `sample` must get what is
certain of it; the trace of `jobs=1` is always the same.
"""

from tests.kit.children import Child, Ending, command, run, start, start_command
from tests.kit.instants import (
    EVENTS,
    FILES,
    HUB,
    KILL_AFTER,
    KILL_BEFORE,
    KILL_WITHIN,
    Event,
    Instant,
    counts,
    fail,
    hold,
    sample,
    send,
    short,
)

__all__ = [
    "EVENTS",
    "FILES",
    "HUB",
    "KILL_AFTER",
    "KILL_BEFORE",
    "KILL_WITHIN",
    "Child",
    "Ending",
    "Event",
    "Instant",
    "command",
    "counts",
    "fail",
    "hold",
    "run",
    "sample",
    "send",
    "short",
    "start",
    "start_command",
]
