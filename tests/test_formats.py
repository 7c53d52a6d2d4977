"""What every format owes: its own files known again, every byte in its place, no fault unseen."""

import contextlib
import json
import tracemalloc
import zlib
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lingconv
from lingconv.checkpoint.open import read_checkpoint
from lingconv.checkpoint.recognition import recognise
from lingconv.containers import registry
from lingconv.containers.megatron import pickles
from lingconv.containers.stored_tensor import HeaderError
from lingconv.errors import LingconvError, UsageError
from lingconv.model.family_file import load_families
from lingconv.planner.planner import build_plan
from lingconv.plans.options import ConvertOptions
from lingconv.storage.local import LocalStorage
from tests.kit.formats import (
    CASES,
    DEEP_KEY,
    FAR_MEMO,
    InMemory,
    contents,
    lengths,
    spoilt,
    trapped,
    with_lies,
)
from tests.kit.packages import forget, install
from tests.support import assert_same_model, read_tensors


@pytest.fixture(scope="module", params=CASES, ids=str)
def written(request, golden, tmp_path_factory):
    """The golden model in a format, written once: where, its plan, and its files in memory."""
    case = request.param
    folder = tmp_path_factory.mktemp("format")
    target = case.target(folder)
    plan = lingconv.plan(golden, case.options, destination=target)
    lingconv.convert(golden, target, case.options)
    return SimpleNamespace(
        case=case, folder=folder, target=target, plan=plan, files=contents(folder)
    )


@pytest.fixture(scope="module")
def families():
    return load_families(None)


@pytest.fixture(autouse=True)
def _known(request):
    """Mark what is known to fail."""
    if "written" in request.fixturenames:
        fails = request.getfixturevalue("written").case.fails
        if request.node.originalname in fails:
            reason = fails[request.node.originalname]
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))


# Detection and round trip -------------------------------------------------------------------------


def test_what_was_written_is_known_again(written):
    storage = LocalStorage(written.folder)
    found, places = registry.detect(storage)
    assert found.name == written.case.format
    assert len(places) == 1
    matches = [(form.detect(storage, ""), form.name) for form in registry.built_in()]
    scores = [(match.score, name) for match, name in matches if match]
    best = max(scores)
    assert best[1] == written.case.format
    assert [score for score, _ in scores].count(best[0]) == 1


def test_the_format_writes_the_layout(written):
    form = registry.format_for(written.case.options.layout)
    assert form.name == written.case.format
    assert {file.container for file in written.plan.files} == {form.name}
    assert registry.format_named(form.name) is form


def test_there_and_back_changes_no_bit(written, golden, tmp_path):
    lingconv.convert(written.target, tmp_path / "back", written.case.back)
    assert_same_model(golden, tmp_path / "back")


def test_headers_alone_are_read(written, families):
    storage = InMemory(written.files)
    model = recognise(read_checkpoint(storage), families)
    assert [fault for fault in model.faults if fault.fatal] == []
    assert storage.bytes_read < sum(map(len, written.files.values())) / 3


# Every byte ---------------------------------------------------------------------------------------


def planned_bytes(written, file):
    """Return how often each byte of a file has a place, and the file made of those places."""
    form = registry.format_of(file)
    disk = (written.folder / file.name).read_bytes()
    assert len(disk) == file.nbytes
    counts, made = np.zeros(file.nbytes, np.uint8), bytearray(file.nbytes)
    for offset, data in form.frames(file):
        assert offset >= 0
        assert offset + len(data) <= file.nbytes
        counts[offset : offset + len(data)] += 1
        made[offset : offset + len(data)] = data
    framed = counts.copy()
    for transfer in file.transfers:
        for extent in transfer.target.extents:
            assert extent.file == file.name
            places = slice(extent.offset, extent.offset + extent.nbytes)
            counts[places] += 1
            made[places] = disk[places]
    sealed = np.zeros(file.nbytes, np.uint8)
    for offset, data in form.seals(file, lambda at, count: zlib.crc32(disk[at : at + count])):
        sealed[offset : offset + len(data)] += 1
        made[offset : offset + len(data)] = data
    assert sealed.max() <= 1
    assert not (sealed.astype(bool) & ~framed.astype(bool)).any(), "a checksum outside of frames"
    return counts, bytes(made), disk


def test_every_byte_has_one_place(written):
    for file in written.plan.files:
        counts, made, disk = planned_bytes(written, file)
        assert counts.max() == 1, file.name
        holes = np.flatnonzero(counts == 0)
        if written.case.padding == 1:
            assert holes.size == 0, file.name
        runs = np.split(holes, np.flatnonzero(np.diff(holes) > 1) + 1)
        assert max(map(len, runs)) < written.case.padding or not holes.size
        assert made == disk, file.name


def test_tensors_are_where_the_reader_finds_them(written):
    """The writer's table against the reader's: the same bytes of the same files."""
    checkpoint = read_checkpoint(LocalStorage(written.folder))
    stored = {
        (box.file, box.offset, box.nbytes)
        for tensor in checkpoint.tensors.values()
        for box in tensor.boxes or (tensor,)
    }
    placed = {
        (extent.file, extent.offset, extent.nbytes)
        for file in written.plan.files
        for transfer in file.transfers
        for extent in transfer.target.extents
    }
    covered = sum(nbytes for *_, nbytes in stored)
    assert covered == sum(nbytes for *_, nbytes in placed)
    assert {(file, offset) for file, offset, _ in placed} >= {
        (file, offset) for file, offset, _ in stored
    }


# Broken files -------------------------------------------------------------------------------------


def outcome(files, families):
    """Open and plan; return what is wrong with that, or an empty text."""
    storage = InMemory(files)
    total = sum(map(len, files.values()))
    try:
        model = recognise(read_checkpoint(storage), families)
        build_plan(model, ConvertOptions())
    except LingconvError as exc:
        if not 2 <= exc.exit_code <= 7:
            return f"exit code {exc.exit_code}: {exc}"
    except BaseException as exc:
        return f"{type(exc).__name__}: {exc}"
    if storage.largest_request > total + (1 << 20):
        return f"{storage.largest_request:,} bytes asked for at once"
    if storage.bytes_read > 2 * total + (1 << 20):
        return f"{storage.bytes_read:,} of {total:,} bytes read"
    return ""


def weights_of(written):
    return [file.name for file in written.plan.files]


def test_cut_files_are_faults_or_errors(written, families):
    chosen = Random(1)
    bad = []
    for name, data in written.files.items():
        for length in lengths(len(data), chosen):
            wrong = outcome({**written.files, name: data[:length]}, families)
            if wrong:
                bad.append(f"{name} cut to {length}: {wrong}")
    assert bad == []


def test_a_cut_weight_file_is_never_planned(written, families):
    for name in weights_of(written):
        data = written.files[name]
        for length in (0, 8, len(data) // 2, len(data) - 1):
            storage = InMemory({**written.files, name: data[:length]})
            with pytest.raises(LingconvError):
                build_plan(recognise(read_checkpoint(storage), families), ConvertOptions())


def test_a_file_that_is_gone_is_never_planned(written, families):
    for name in weights_of(written):
        files = {other: data for other, data in written.files.items() if other != name}
        with pytest.raises(LingconvError):
            build_plan(recognise(read_checkpoint(InMemory(files)), families), ConvertOptions())


@pytest.mark.parametrize("seed", range(3))
def test_hostile_bytes_are_faults_or_errors(written, families, seed):
    bad = []
    for number in range(60):
        files, what = spoilt(written.files, Random(f"{seed} {number}"))
        if wrong := outcome(files, families):
            bad.append(f"{what}: {wrong}")
    assert bad == []


def test_a_config_that_lies_is_a_fault_or_an_error(written, families):
    tried = [(what, outcome(files, families)) for files, what in with_lies(written.files)]
    assert [each for each in tried if each[1]] == []


def test_crafted_files_are_faults_or_errors(written, families):
    """They take no more memory than files of their size may."""
    tried = []
    for files, what in trapped(written.files):
        tracemalloc.start()
        wrong = outcome(files, families)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if wrong or peak > 100 << 20:
            tried.append(f"{what}: {wrong}; {peak:,} bytes of memory")
    assert tried == []


def test_a_small_pickle_takes_little_memory():
    tracemalloc.start()
    try:
        with contextlib.suppress(HeaderError):
            pickles.loads(FAR_MEMO)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_deep_key_is_a_key_like_any_other():
    """It is known by its identity: nobody walks through it to hash it."""
    (value,) = pickles.loads(DEEP_KEY).values()
    assert value == 1


# Formats of other packages ------------------------------------------------------------------------

TOY = '''
import json

from lingconv.containers.base import OWN, ClosingFiles, Match
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.hf.identify import identify
from lingconv.containers.stored_tensor import StoredTensor
from lingconv.encodings.dtypes import DTYPES


class Lines:
    """A table of JSON lines in `weights.lines`, and the elements in `weights.data`."""

    name = "lines"
    layouts = ("lines",)
    options_field = ""
    is_self_contained = False
    sums_elements = False

    def detect(self, storage, file):
        return Match(OWN) if "weights.lines" in storage.files() else None

    def read(self, storage, place, overrides):
        tensors = {}
        for line in storage.read("weights.lines").splitlines():
            name, dtype, shape, offset, nbytes = json.loads(line)
            tensors[name] = StoredTensor(
                name, DTYPES[dtype], tuple(shape), "weights.data", offset, nbytes
            )
        files = storage.files()
        return Checkpoint(
            storage=storage,
            config=json.loads(storage.read("config.json")),
            tensors=tensors,
            shards={"weights.data": files["weights.data"]},
            side_files={},
            ignored={},
            faults=(),
            format=self.name,
        )

    def identify(self, checkpoint, families, overrides):
        return identify(checkpoint, families, overrides)


LINES = Lines()
'''


def write_lines(golden, folder):
    """Write the golden model as the toy format has it."""
    folder.mkdir()
    table, data = [], bytearray()
    for name, tensor in read_tensors(golden).items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dtype = {"torch.bfloat16": "BF16", "torch.float32": "F32"}[str(tensor.dtype)]
        table.append(json.dumps([name, dtype, list(tensor.shape), len(data), len(raw)]))
        data += raw
    (folder / "weights.lines").write_text("\n".join(table))
    (folder / "weights.data").write_bytes(data)
    (folder / "config.json").write_bytes((golden / "config.json").read_bytes())
    return folder


def test_a_format_of_another_package_is_read(golden, tmp_path, monkeypatch):
    source = write_lines(golden, tmp_path / "source")
    (tmp_path / "packages").mkdir()
    where = {"group": "lingconv.containers", "name": "lines", "value": "LINES"}
    install(monkeypatch, tmp_path / "packages", TOY, **where)
    try:
        assert registry.format_for("lines").name == "lines"
        assert lingconv.inspect(source).sound
        lingconv.convert(source, tmp_path / "out")
        assert_same_model(golden, tmp_path / "out")
    finally:
        forget()
    monkeypatch.undo()
    with pytest.raises(LingconvError):
        lingconv.inspect(source)
    with pytest.raises(UsageError, match="`layout` is `lines`"):
        registry.format_for("lines")
