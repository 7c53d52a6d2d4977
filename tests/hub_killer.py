"""Kills conversions from one repository to another, under fire. Run as a program by the tests.

    python -m tests.hub_killer SOURCE WORK ROUNDS

The Hub runs in this process; every run is a process of its own, killed at a random instant, or
right after a random line of the journal, and then run again until it is done. Prints what was seen.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.hub_server import TOKEN, Fire, Hub
from tests.hub_support import HURRIED, environment, sampled, weight_bytes

SHARES = {
    "429": 0.03, "503": 0.03, "cut": 0.05, "short": 0.05, "expired": 0.05, "store 503": 0.05,
    "etag": 0.02, "upload cut": 0.05, "upload 503": 0.05, "commit fails": 0.1, "commit lost": 0.1,
}  # fmt: skip
MAX_DISK = 700_000
SOURCE, OUT = "org/source", "org/out"


def in_child(staging, last_note=0):
    """Start a conversion in a process of its own; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        import lingconv
        from lingconv.execution.journal import Journal
        from tests.noted import Noted

        Journal._note = Noted(last_note)
        os.dup2(os.open(staging.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        lingconv.convert(
            f"hf://{SOURCE}",
            f"hf://{OUT}",
            lingconv.ConvertOptions(dtype="fp8", max_shard_bytes=300_000),
            publish=lingconv.PublishOptions(create=True),
            resources=lingconv.Resources(
                jobs=4, max_memory_bytes=100 << 20, max_disk_bytes=MAX_DISK, staging=staging
            ),
        )
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def one_run(hub, quiet, work, number, rng, duration, notes):
    """Kill a run until it is through; return what was seen."""
    hub.repositories.pop(OUT, None)
    own = set(quiet.values()) - set(hub.repositories[SOURCE].files("main")[1].values())
    for digest in own:
        hub.blobs.pop(digest, None)
    hub.stored.clear()
    staging = work / f"run-{number}/staging"
    staging.mkdir(parents=True)
    committed_before = {}
    seen = {"killed": 0, "again": 0, "failed": 0}
    with sampled(lambda: weight_bytes(staging)) as disk:
        if number % 2:
            child = in_child(staging, rng.randint(1, notes))
        else:
            child = in_child(staging)
            time.sleep(rng.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        seen["killed"] = os.WIFSIGNALED(status)
        time.sleep(0.02)  # what was on its way may still be committed
        if OUT in hub.repositories:
            committed_before = dict(hub.repositories[OUT].files("main")[1])
        stored_before = dict(hub.stored)
        for _ in range(5):
            _, status, used = os.wait4(in_child(staging), 0)
            seen["rss"] = used.ru_maxrss << 10
            if status == 0:
                break
            seen["failed"] += 1
    again = [d for d in committed_before.values() if hub.stored[d] > stored_before.get(d, 0)]
    seen["again"] = len(again)
    seen["disk"] = max(disk)
    seen["different"] = hub.repositories[OUT].files("main")[1] != quiet
    return seen


def main(source, work, rounds):
    rng = random.Random(7)
    with Hub() as hub:
        os.environ.clear()
        os.environ.update(environment(hub.endpoint, work / "home"))
        import huggingface_hub.utils._http as client_http

        import lingconv.api
        import lingconv.execution.pipeline.transcoder
        import lingconv.execution.pipeline.worker_pool
        import lingconv.execution.publishing.publisher
        import lingconv.storage.byte_ranges
        import lingconv.storage.hub.client

        client_http.time = HURRIED
        lingconv.storage.hub.client.FIRST_WAIT_S = 0.01
        lingconv.storage.byte_ranges.SMALL_BYTES = 1000
        lingconv.storage.byte_ranges.BLOCK_BYTES = 4096
        lingconv.storage.byte_ranges.REQUEST_BYTES = 100_000
        lingconv.execution.pipeline.worker_pool.PIECE_BYTES = 100_000
        hub.add(SOURCE, {path.name: path.read_bytes() for path in source.iterdir()})
        # Compiles the kernels, and says how long a run takes and what comes of it.
        for number in range(2):
            staging = work / f"quiet-{number}"
            staging.mkdir(parents=True)
            hub.repositories.pop(OUT, None)
            started = time.monotonic()
            _, status, used = os.wait4(in_child(staging), 0)
            duration = time.monotonic() - started
            assert status == 0
        quiet = hub.repositories[OUT].files("main")[1]
        journal = next(staging.rglob("journal.jsonl")).read_text()
        hub.fire = Fire(seed=11, **SHARES)
        hub.link_uses = 20
        runs = [
            one_run(hub, quiet, work, number, rng, 1.3 * duration, journal.count("\n") - 1)
            for number in range(rounds)
        ]
        state = [path for path in work.rglob("*") if path.is_file()]
        seen = {
            "killed": sum(run["killed"] for run in runs),
            "different": sum(run["different"] for run in runs),
            "sent again": sum(run["again"] for run in runs),
            "failed": sum(run["failed"] for run in runs),
            "disk": max(run["disk"] for run in runs),
            "rss": max(run["rss"] for run in runs),
            "quiet rss": used.ru_maxrss << 10,
            "met": dict(hub.fire.met),
            "leaks": len(hub.leaks),
            "tokens": [str(path) for path in state if TOKEN.encode() in path.read_bytes()],
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
