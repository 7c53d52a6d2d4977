"""Every planted fault is found and named; every right conversion passes."""

import json
import os
import re
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


def first_line(fault, bases, folder):
    """Return the finding that names the culprit, without the figures that follow it."""
    source, broken = planted(fault, bases, folder)
    findings = map(str, lingconv.verify(source, broken).findings)
    line = next(line for line in findings if fault.culprit in line)
    return re.split(r"; (?=\d|relative)| \((?=bf16|f32)", line)[0]


def table(bases, root):
    """Return the table of faults as it stands in the documentation."""
    rows = ["| what went wrong | what `verify` says |", "|---|---|"]
    for number, fault in enumerate(FAULTS):
        rows.append(f"| {fault.title} | {first_line(fault, bases, root / str(number))} |")
    return "\n".join(rows)


def test_the_documentation_shows_what_verify_really_says(bases, tmp_path):
    begin, end = "<!-- faults: begin -->\n", "\n<!-- faults: end -->"
    text = DOCS.read_text()
    before, _, rest = text.partition(begin)
    shown, _, after = rest.partition(end)
    found = table(bases, tmp_path)
    if os.environ.get("WRITE_DOCS"):
        DOCS.write_text(before + begin + found + end + after)
    assert len(FAULTS) >= 40
    assert shown == found, "run this test with WRITE_DOCS=1"
