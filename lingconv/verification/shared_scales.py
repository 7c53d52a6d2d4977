"""Scales of whole matrices that runtimes make one of: all parts have to have the same.

vLLM and SGLang make one matrix of gate and up, and of q, k and v, and keep one NVFP4 scale for it:
the first, or the largest. Checkpoints where the parts have one each are loaded, with wrong numbers
(vLLM issues 54974 and 55073).
"""

from collections.abc import Iterator

import numpy as np

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.plans.tensor_map import StoredMatrix
from lingconv.storage.open_files import OpenFiles
from lingconv.verification.verdict import Finding

_NUMBER = 2  # the tensor of the matrix's own scale, after those of codes and scales


def shared_scale_findings(model: Model) -> Iterator[Finding]:
    """Yield a finding for each set of matrices whose own scales differ."""
    sets = [members for members in _fused_sets(model).values() if len(members) > 1]
    with OpenFiles(model.checkpoint.storage) as files:
        for member in (each for members in sets for each in members):
            extent = member.extents[_NUMBER]
            files[extent.file].expect(extent.offset, extent.nbytes)
        for members in sets:
            numbers = {member.name: _number(member, files) for member in members}
            if len({*numbers.values()}) > 1:
                first, *others = numbers
                message = (
                    f"has the scale {numbers[first]:.6g},"
                    + "".join(f" {name} has {numbers[name]:.6g}," for name in others)
                    + " and runtimes keep one for all of them"
                )
                tensor = model.tensor(first)
                yield Finding("scale", tensor.rows[0].logical if tensor else first, message)


def _fused_sets(model: Model) -> dict[str, list[StoredMatrix]]:
    """Return the matrices with a scale of their own, by the set that runtimes make one of."""
    sets: dict[str, list[StoredMatrix]] = {}
    for name, stored in model.stored.items():
        fused = model.layout.tensors[name].fused
        if fused and stored.encoding.needs_amax:
            sets.setdefault(fused, []).append(stored)
    return sets


def _number(stored: StoredMatrix, files: OpenFiles) -> float:
    """Return a matrix's own scale."""
    extent = stored.extents[_NUMBER]
    data = np.empty(1, np.float32)
    files[extent.file].read_into(extent.offset, data.view(np.uint8).data)
    return float(data[0])
