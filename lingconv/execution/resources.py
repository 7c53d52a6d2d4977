"""What a run may use of the machine that it is on, and who does it."""

from dataclasses import dataclass
from pathlib import Path

from lingconv.execution.devices import CPU
from lingconv.execution.plan_share import PlanShare
from lingconv.storage.machine import num_processors

DEFAULT_MEMORY_BYTES = 1 << 30
LOCAL, RAY = "local", "ray"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes a byte of the output.

    `max_disk_bytes` bounds the weights that are on disk only for a while: files on their way to a
    repository, and whole files of one where `download` asks for them. 0 is two of the largest of
    each. `staging` is the folder where files are kept until a repository has them. `part` is the
    share of the files that this run writes; `finish` then makes a checkpoint of all shares. With
    the `executor` RAY it is done by a cluster, the one at `address` or one on this machine.
    `device` names the GPUs that decode and encode what they have kernels for (`devices.py`).
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
        """Return what each of the two may take of the disk, files that come and files that go."""
        return self.max_disk_bytes // (2 if self.download and publishes else 1)

    @property
    def resolved_jobs(self) -> int:
        """Threads: as many as asked for, else two for each processor: half of them write."""
        return self.jobs or 2 * num_processors()
