"""Kills conversions from one repository to another, under fire, and runs them until they are done.

The Hub runs in the process of the test; every run is a process of its own, killed at a stated
instant.
"""

import random
from dataclasses import dataclass

from tests.hub_server import Fire
from tests.hub_support import point_client_at, watched, weight_bytes
from tests.kit import Instant, counts, run, sample

SHARES = {
    "429": 0.03, "503": 0.03, "cut": 0.05, "short": 0.05, "expired": 0.05, "store 503": 0.05,
    "etag": 0.02, "upload cut": 0.05, "upload 503": 0.05, "commit fails": 0.1, "commit lost": 0.1,
}  # fmt: skip
MAX_DISK = 700_000
SOURCE, OUT = "org/source", "org/out"
REQUEST_BYTES = 100_000
# What is done at least as often by a run under fire as by a quiet one, whoever is quicker.
CERTAIN = ("journal", "rename", "remove")


def publish(endpoint, home, staging):
    """Convert from the Hub to the Hub; run in a child. Returns the most that lay on disk."""
    import pytest

    import lingconv
    import lingconv.execution.pipeline.worker_pool
    import lingconv.storage.byte_ranges

    point_client_at(pytest.MonkeyPatch(), endpoint, home)
    lingconv.storage.byte_ranges.SMALL_BYTES = 1000
    lingconv.storage.byte_ranges.BLOCK_BYTES = 4096
    lingconv.storage.byte_ranges.REQUEST_BYTES = REQUEST_BYTES
    lingconv.execution.pipeline.worker_pool.PIECE_BYTES = 100_000
    with watched(lambda: weight_bytes(staging)) as disk:
        lingconv.convert(
            f"hf://{SOURCE}",
            f"hf://{OUT}",
            lingconv.ConvertOptions(dtype="fp8", max_shard_bytes=300_000),
            publish=lingconv.PublishOptions(create=True),
            resources=lingconv.Resources(
                jobs=4, max_memory_bytes=100 << 20, max_disk_bytes=MAX_DISK, staging=staging
            ),
        )
    return max(disk)


@dataclass
class Seen:
    """The most that lay on disk, and in the memory of a quiet run and of those under fire."""

    disk: int = 0
    quiet_peak: int = 0
    peak: int = 0


def certain(quiet, files):
    """Return how often each event comes at least, in any run."""
    times = {name: often for name, often in counts(quiet.trace).items() if name in CERTAIN}
    weights = [len(data) for name, data in files.items() if name.endswith(".safetensors")]
    times["upload"] = len(weights)
    # What one commit sends has room on the disk; what completes the target has one of its own.
    times["commit"] = -(-sum(weights) // MAX_DISK) + 1
    times["download"] = sum(map(len, files.values())) // REQUEST_BYTES
    return times


def kill_under_fire(hub, source, work, rounds):
    """Kill `rounds` runs and let each go on; return what was seen.

    Raises AssertionError for a run that was not killed where it had to be, that came to another
    repository than a quiet one, or that sent what was there already.
    """
    home = work / "home"
    hub.add(SOURCE, {path.name: path.read_bytes() for path in source.iterdir()})
    seen = Seen()
    quiet = run(publish, hub.endpoint, home, work / "quiet", watch=CERTAIN)
    seen.quiet_peak, seen.disk = quiet.peak_bytes, quiet.value
    expected = hub.repositories[OUT].files("main")[1]
    instants = sample(certain(quiet, hub.tree(OUT)), rounds, random.Random(7))
    hub.fire = Fire(seed=11, **SHARES)
    hub.link_uses = 20
    for number, instant in enumerate(instants):
        _forget(hub, expected)
        _one_run(hub, home, work / f"run-{number}/staging", instant, seen)
        assert hub.repositories[OUT].files("main")[1] == expected, instant
    return seen


def _forget(hub, expected):
    """Let the Hub know nothing of what earlier runs sent."""
    hub.repositories.pop(OUT, None)
    for digest in set(expected.values()) - set(hub.repositories[SOURCE].files("main")[1].values()):
        hub.blobs.pop(digest, None)
    hub.stored.clear()


def _one_run(hub, home, staging, instant: Instant, seen):
    arguments = (publish, hub.endpoint, home, staging)
    assert run(*arguments, at=instant).killed, instant
    hub.settle()
    left = weight_bytes(staging)
    there = dict(hub.repositories[OUT].files("main")[1]) if OUT in hub.repositories else {}
    stored = dict(hub.stored)
    done = run(*arguments)
    seen.disk = max(seen.disk, left, done.value)
    seen.peak = max(seen.peak, done.peak_bytes)
    again = [name for name, digest in there.items() if hub.stored[digest] > stored.get(digest, 0)]
    assert not again, instant
