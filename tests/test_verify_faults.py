"""Every planted fault is found and named; every right conversion passes."""

import json
import shutil
from pathlib import Path

import pytest

import lingconv
from lingconv import ConvertOptions
from tests.faults import FAULTS
from tests.support import rewrite

DOCS = Path(__file__).parents[1] / "docs" / "verify.md"


@pytest.fixture(scope="session")
def bases(golden, tmp_path_factory):
    """Return name -> (source, right conversion)."""
    root = tmp_path_factory.mktemp("bases")
    lingconv.convert(golden, root / "bf16")
    lingconv.quantize(golden, root / "fp8")
    lingconv.convert(root / "fp8", root / "from_fp8", ConvertOptions(dtype="bf16"))
    return {
        "bf16": (golden, root / "bf16"),
        "fp8": (golden, root / "fp8"),
        "from_fp8": (root / "fp8", root / "from_fp8"),
    }


def planted(fault, bases, folder):
    """Return the source and a conversion with the fault in it."""
    source, right = bases[fault.base]
    shutil.copytree(right, folder)
    config = json.loads((folder / "config.json").read_text())
    rewrite(folder, lambda tensors: fault.plant(tensors, config))
    (folder / "config.json").write_text(json.dumps(config))
    return source, folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_planted_fault_is_found_and_named(fault, bases, tmp_path):
    source, broken = planted(fault, bases, tmp_path / "broken")
    verdict = lingconv.verify(source, broken)
    assert not verdict.ok
    first = [str(finding) for finding in verdict.findings[:3]]
    assert any(fault.culprit in line for line in first), first
