"""What was sent, read back before it is declared a checkpoint: the weights are gone from the disk.

Every file of the plan has to be listed with the size that the plan gives and the digest that was
noted when it was sent, and the headers have to make the checkpoint that the last commit names.
"""

from collections.abc import Mapping
from pathlib import Path

from lingconv.checkpoint.open import read_all
from lingconv.errors import CheckpointError
from lingconv.plans.plan import Plan
from lingconv.storage import Storage
from lingconv.storage.hub.address import is_hub
from lingconv.storage.overlay import Overlay
from lingconv.storage.upload_target import ListedFile, refuse_different

_BY_RECHECK = "add `recheck`: all files are written again, and those sent that differ"
_BY_REMOVAL = "remove the files that are named from there, then run the same command again"


def check_sent(
    there: Storage, plan: Plan, sent: Mapping[str, ListedFile], small: Mapping[str, Path | bytes]
) -> None:
    """Raise CheckpointError unless a store holds the plan's weights, and `small` completes them."""
    hint = _BY_RECHECK if is_hub(there.uri) else _BY_REMOVAL
    listed = there.files()
    found = {name: ListedFile(*stat) for name, stat in listed.items() if name in sent}
    refuse_different(there.uri, found, {file.name: sent[file.name] for file in plan.files})
    sizes = [
        f"{file.name}: {sent[file.name].size:,} bytes, expected {file.nbytes:,}"
        for file in plan.files
        if sent[file.name].size != file.nbytes
    ]
    if sizes:
        raise CheckpointError(
            f"{there.uri} does not hold the plan's files", details=sizes, hint=hint
        )
    made = {
        name: content if isinstance(content, bytes) else content.read_bytes()
        for name, content in small.items()
    }
    models = read_all(Overlay(there, [file.name for file in plan.files], made))
    fatal = [fault for model in models for fault in model.faults if fault.fatal]
    if fatal:
        raise CheckpointError(
            f"{there.uri} would be no sound checkpoint: {len(fatal)} faults",
            faults=fatal,
            hint=hint,
        )
