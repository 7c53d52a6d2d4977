"""What this machine offers: processors, disk space, memory in use."""

import os
import resource
import shutil
from pathlib import Path


def num_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_bytes(destination: Path) -> int:
    """Return the bytes free where `destination` is, or is going to be."""
    folder = destination.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def peak_resident_bytes() -> int:
    """Return the most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
