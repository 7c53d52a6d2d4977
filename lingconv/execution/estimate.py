"""Estimate of a plan's duration and resources, from a timed sample of it or from a profile.

A plan has a few kinds of transfers: copies, or decoding from one encoding and encoding in another.
Each kind is timed by running it, from the real source to the disk of the target, on a few hundred
megabytes of the plan's own rows. The rest is extrapolated by bytes, because the cost of a strip
depends only on its kind and size.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lingconv.containers.hf.writer import pack_safetensors
from lingconv.errors import UsageError
from lingconv.execution.engine import write_share
from lingconv.execution.resources import Resources
from lingconv.plans.plan import OutputFile, Plan, Transfer, in_term_runs
from lingconv.storage import Storage
from lingconv.storage.machine import existing_folder, peak_resident_bytes

SCHEMA = "lingconv.profile/1"
SAMPLE_BYTES = 512 << 20
_SMALL_BYTES = 16 << 20
_ROWS = 128  # whole blocks of every encoding


@dataclass(frozen=True, slots=True)
class Profile:
    """The speed of a machine for each kind of transfer (bytes of output per second).

    `start_s` is the time before the first byte is written; `rss_bytes` the memory of the process.
    """

    rates: Mapping[str, float]
    start_s: float
    rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return {"schema": SCHEMA, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated duration of a run on each of `machines`; network seconds are 0 without one.

    Reading from a network, converting and uploading overlap: the slowest one counts.
    """

    seconds: float
    convert_s: float
    network_s: float
    network_in_bytes: int
    network_out_bytes: int
    rss_bytes: int
    machines: int


def kind_of(transfer: Transfer) -> str:
    """Return the name of a transfer's kind: a copy, or the encodings that it goes between."""
    if transfer.copies:
        return f"copy {transfer.target.encoding.label}"
    found = sorted({segment.source.encoding.label for segment in transfer.segments})
    count = sum(len(term.sources) for term in transfer.terms)
    average = f"average of {count} " if count > 1 else ""
    return f"{average}{', '.join(found)} -> {transfer.target.encoding.label}"


def by_kind(plan: Plan) -> dict[str, tuple[int, list[Transfer]]]:
    """Return the bytes of output and the transfers of each kind in a plan."""
    found: dict[str, tuple[int, list[Transfer]]] = {}
    for transfer in plan.transfers():
        nbytes = sum(spec.nbytes for spec in transfer.target.specs())
        total, transfers = found.get(kind_of(transfer), (0, []))
        transfers.append(transfer)
        found[kind_of(transfer)] = total + nbytes, transfers
    return found


def calibrate(
    plan: Plan, storages: Sequence[Storage], folder: Path, resources: Resources
) -> Profile:
    """Return the Profile of this machine: each kind of transfer, timed on the disk of `folder`."""
    rates, start_s = {}, 0.0
    with tempfile.TemporaryDirectory(prefix=".lingconv-", dir=existing_folder(folder)) as work:
        for number, (kind, (_, transfers)) in enumerate(by_kind(plan).items()):
            # The first one loads the kernels; the second one gives the cost of a run of any size.
            (cold_s, _), (short_s, small), (long_s, large) = (
                _timed(plan, transfers, nbytes, storages, Path(work, f"{number}-{run}"), resources)
                for run, nbytes in enumerate((_SMALL_BYTES, _SMALL_BYTES, SAMPLE_BYTES))
            )
            rates[kind] = _rate(small, short_s, large, long_s)
            start_s = max(start_s, cold_s - small / rates[kind])
    return Profile(rates, start_s, peak_resident_bytes())


def _rate(small: int, short_s: float, large: int, long_s: float) -> float:
    """Return bytes per second, without the fixed cost of a run."""
    if large > small and long_s > short_s:
        return (large - small) / (long_s - short_s)
    return large / long_s


def _timed(
    plan: Plan,
    transfers: Sequence[Transfer],
    nbytes: int,
    storages: Sequence[Storage],
    folder: Path,
    resources: Resources,
) -> tuple[float, int]:
    """Return the seconds that about `nbytes` of some transfers take, and the bytes of output."""
    sample = replace(plan, files=_files(transfers, nbytes, plan), side_files={})
    started = time.perf_counter()
    write_share(sample, {"outputs": []}, storages, folder, "sample", resources)
    seconds = time.perf_counter() - started
    written = sum(file.nbytes for file in sample.files)
    for file in sample.files:
        (folder / file.name).unlink()
    return seconds, written


def _files(transfers: Sequence[Transfer], nbytes: int, plan: Plan) -> tuple[OutputFile, ...]:
    """Return output files of about `nbytes` that are filled by rows of some transfers."""
    largest = max(file.nbytes for file in plan.files)
    samples = list(_samples(transfers, nbytes))
    return pack_safetensors(samples, min(largest, max(1, nbytes // 2)))


def _samples(transfers: Sequence[Transfer], nbytes: int) -> Iterator[Transfer]:
    """Yield transfers of about `nbytes` in all; of large ones only the first rows."""
    left = nbytes
    for number, transfer in enumerate(transfers):
        if left <= 0:
            return
        row_bytes = max(1, transfer.target.encoding.row_bytes(transfer.cols))
        rows = max(_ROWS, left // row_bytes // _ROWS * _ROWS)
        name = f"sample.{number}"
        if rows >= transfer.rows or transfer.target.pitch:
            target = transfer.target._replace(name=name, extents=())
            sample = transfer._replace(target=target)
        else:
            shape = (rows, *transfer.target.shape[1:])
            target = transfer.target._replace(name=name, shape=shape, stack=0, extents=())
            terms = next(in_term_runs(transfer, [rows]))
            sample = transfer._replace(target=target, terms=terms)
        left -= sample.rows * row_bytes
        yield sample


def estimate(
    plan: Plan,
    profile: Profile,
    *,
    machines: int = 1,
    network_bytes_per_s: float = 0.0,
    reads_far: bool = False,
    writes_far: bool = False,
) -> Estimate:
    """Return the Estimate of a plan on `machines` like the one of the profile.

    Rates that were measured with a remote source include its network. Raises UsageError if the
    profile lacks a kind of transfer of the plan, or if the target is uploaded over a network of
    unknown speed.
    """
    convert_s = 0.0
    for kind, (nbytes, _) in by_kind(plan).items():
        if kind not in profile.rates:
            known = ", ".join(profile.rates)
            raise UsageError(f"the profile has no rate for `{kind}`", hint=f"it knows {known}")
        convert_s += nbytes / profile.rates[kind]
    # No file is written by two machines, so the largest one bounds the speedup.
    largest = max(file.nbytes for file in plan.files) / sum(file.nbytes for file in plan.files)
    convert_s *= max(1 / machines, largest)
    inward = plan.read_bytes if reads_far else 0
    outward = plan.write_bytes if writes_far else 0
    if outward and not network_bytes_per_s:
        raise UsageError(
            "the target is sent over a network",
            hint="say how fast it is: `network_bytes_per_s=10Gbit`",
        )
    network_s = 0.0
    if network_bytes_per_s:
        network_s = max(inward, outward) / network_bytes_per_s / machines
    return Estimate(
        seconds=profile.start_s + max(convert_s, network_s),
        convert_s=convert_s,
        network_s=network_s,
        network_in_bytes=inward,
        network_out_bytes=outward,
        rss_bytes=profile.rss_bytes,
        machines=machines,
    )


def read_profile(path: Path) -> Profile:
    """Return the Profile in a file of `Profile.to_json`; raises UsageError for other files."""
    try:
        value = json.loads(path.read_text("utf-8"))
        if value.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        return Profile(**value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UsageError(f"{path} is no profile: {exc}") from exc
