"""The resources of a run: threads, memory, disk, devices, and the executor."""

from dataclasses import dataclass
from pathlib import Path

from lingconv.execution.devices import CPU
from lingconv.execution.plan_share import PlanShare
from lingconv.storage.machine import num_processors

DEFAULT_MEMORY_BYTES = 1 << 30
LOCAL, RAY = "local", "ray"


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources that a run may use; none of them changes a byte of the output.

    `max_disk_bytes` bounds the weights that are on disk temporarily: files to be uploaded, and,
    with `download`, files that were downloaded whole. 0 means two of the largest of each. `staging`
    is the folder of files until they are uploaded. `part` is the share of the files that this run
    writes; `finish` then makes a checkpoint of all shares. With the `executor` RAY a cluster does
    the work, the one at `address` or one on this machine. `device` names the GPUs, which decode and
    encode the encodings that they have kernels for (`devices.py`).
    """

    jobs: int = 0
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES
    max_disk_bytes: int = 0
    download: bool = False
    staging: Path | None = None
    part: PlanShare | None = None
    executor: str = LOCAL
    address: str = ""
    device: str = CPU

    def disk_share(self, *, publishes: bool) -> int:
        """Return the bytes of disk for downloaded files and, equally, for files to be uploaded."""
        return self.max_disk_bytes // (2 if self.download and publishes else 1)

    @property
    def resolved_jobs(self) -> int:
        """Number of threads: as asked for, else two for each CPU, because half of them write."""
        return self.jobs or 2 * num_processors()
