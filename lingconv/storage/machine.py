"""What this machine offers: processors, disk space, memory in use."""

import os
import re
import resource
import shutil
import sys
from pathlib import Path

from lingconv.errors import ResourceError

_OTHER_FILES = 256


def num_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_bytes(destination: Path) -> int:
    """Return the bytes free where `destination` is, or is going to be."""
    return shutil.disk_usage(existing_folder(destination)).free


def existing_folder(destination: Path) -> Path:
    """Return the innermost folder on the way to `destination` that is there."""
    folder = destination.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def peak_resident_bytes() -> int:
    """Return the most memory that this process held so far.

    Linux tells it of the program itself; `ru_maxrss` begins with what the program's parent held.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii")
        held = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    except OSError:
        held = None
    if held:
        return int(held[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files so that `count` may be open besides a few others.

    Raises ResourceError where the system does not let it.
    """
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ResourceError(
                f"{count:,} files are to be read, this process may open {hard:,}",
                hint=f"raise the limit: `ulimit -Hn {needed}`",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
