"""What a run survives: kills, full disks, vanishing sources, rivals."""

import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import lingconv.execution.engine
from lingconv import (
    CheckpointError,
    ConvertOptions,
    DestinationError,
    PermissionDenied,
    ResourceError,
    Resources,
    convert,
)
from lingconv.api import open_model
from lingconv.execution.engine import execute
from lingconv.execution.progress import Silent
from lingconv.planner.planner import build_plan
from lingconv.storage.local_output import LocalOutput
from tests.killer import kill_many
from tests.kit import Instant, fail, run, short, start
from tests.support import copy_checkpoint, edit_json, tree_digest

MANY = ConvertOptions(dtype="fp8", max_shard_bytes=300_000)


class StopAfter(Silent):
    """Raises once some files are finished."""

    def __init__(self, files, error=KeyboardInterrupt):
        self.left = files
        self.error = error

    def file_ends(self, name, nbytes, seconds):
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["fp8", "nvfp4", "gguf", "average"])
def test_kills(golden, tmp_path, kind, rounds):
    """kill -9 anywhere: the same command gives the same bytes, and writes no file twice."""
    seen = kill_many(kind, golden, tmp_path, rounds)
    assert seen.resumed >= rounds // 5, seen
    assert len(seen.stages) >= rounds // 5, seen


def test_interrupt_keeps_what_is_finished_and_resumes(golden, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(lingconv.Interrupted) as caught:
        convert(golden, target, MANY, progress=StopAfter(3), resources=Resources(jobs=1))
    assert caught.value.exit_code == 130
    assert "same command" in caught.value.hint
    assert not (target / "config.json").exists()
    result = convert(golden, target, MANY)
    assert result.files_found_finished == 3
    convert(golden, tmp_path / "undisturbed", MANY)
    assert tree_digest(target) == tree_digest(tmp_path / "undisturbed")


def test_a_finished_run_has_nothing_to_do(golden, tmp_path):
    first = convert(golden, tmp_path / "out", MANY)
    again = convert(golden, tmp_path / "out", MANY)
    assert (again.files_written, again.files_found_finished) == (0, first.files_written)


def test_other_options_are_refused_with_what_changed(golden, tmp_path):
    convert(golden, tmp_path / "out", MANY)
    other = ConvertOptions(dtype="bf16", max_shard_bytes=300_000)
    with pytest.raises(DestinationError) as caught:
        convert(golden, tmp_path / "out", other)
    assert 'option dtype: was "fp8", now "bf16"' in caught.value.details
    assert "start over with `fresh`" in caught.value.hint
    convert(golden, tmp_path / "out", other, fresh=True)
    convert(golden, tmp_path / "new", other)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "new")


def test_a_changed_source_is_refused_with_what_changed(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    convert(source, tmp_path / "out", MANY)
    shard = source / "model-00002-of-00003.safetensors"
    os.utime(shard, ns=(1, 1))
    with pytest.raises(DestinationError) as caught:
        convert(source, tmp_path / "out", MANY)
    assert caught.value.details == (
        f"source {shard.name}: was 1,779,656 bytes, now 1,779,656 bytes, changed since",
    )


def test_a_finished_file_that_was_changed_is_noticed(golden, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(lingconv.Interrupted):
        convert(golden, target, MANY, progress=StopAfter(2), resources=Resources(jobs=1))
    finished = next(iter(target.glob("*.safetensors")))
    os.utime(finished, ns=(5, 5))
    with pytest.raises(DestinationError, match=r"was changed after it was finished"):
        convert(golden, target, MANY)
    finished.unlink()
    convert(golden, target, MANY)


def test_a_foreign_folder_is_never_touched(golden, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(DestinationError, match="not written by lingconv"):
            convert(golden, target, MANY, fresh=fresh)
    assert [path.name for path in target.iterdir()] == ["precious.txt"]


def test_fresh_removes_only_what_the_earlier_run_wrote(golden, tmp_path):
    target = tmp_path / "out"
    convert(golden, target, MANY)
    (target / "notes.txt").write_text("mine")
    convert(golden, target, ConvertOptions(), fresh=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert not (target / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_strangers_record_deletes_nothing_outside(golden, tmp_path, absolute):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    target = tmp_path / "out"
    convert(golden, target, MANY)
    name = str(precious) if absolute else "../precious.txt"
    edit_json(target / ".lingconv" / "run.json", lambda run: run["outputs"].append(name))
    convert(golden, target, ConvertOptions(), fresh=True)
    assert precious.read_text() == "mine"


def test_a_target_inside_the_source_is_refused(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    for target in (source, source / "out"):
        with pytest.raises(DestinationError, match="inside the source"):
            convert(source, target, MANY)


def test_two_runs_exclude_each_other(golden, tmp_path):
    inside, go_on = threading.Event(), threading.Event()

    class Wait(Silent):
        def file_begins(self, name, nbytes, held):
            inside.set()
            go_on.wait()

    first = threading.Thread(
        target=convert, args=(golden, tmp_path / "out", MANY), kwargs={"progress": Wait()}
    )
    first.start()
    try:
        inside.wait()
        with pytest.raises(DestinationError, match="another run is writing"):
            convert(golden, tmp_path / "out", MANY)
    finally:
        go_on.set()
        first.join()
    convert(golden, tmp_path / "again", MANY)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "again")


def test_a_source_that_vanishes_mid_run(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    shard = source / "model-00003-of-00003.safetensors"

    class Vanish(Silent):
        def file_ends(self, name, nbytes, seconds):
            if shard.exists():
                shard.rename(source / "hidden")

    one = Resources(jobs=1)
    with pytest.raises(CheckpointError, match=r"00003.*not there any more") as caught:
        convert(source, tmp_path / "out", MANY, progress=Vanish(), resources=one)
    assert "restore the source" in caught.value.hint
    (source / "hidden").rename(shard)
    assert convert(source, tmp_path / "out", MANY).files_found_finished >= 1
    convert(source, tmp_path / "undisturbed", MANY)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["truncate", "touch"])
def test_a_source_that_changes_mid_run(golden, tmp_path, change):
    source = copy_checkpoint(golden, tmp_path / "in")
    model = open_model(source)
    plan = build_plan(model, MANY)
    shard = source / "model-00002-of-00003.safetensors"
    if change == "truncate":
        os.truncate(shard, 100_000)
    else:
        os.utime(shard, ns=(7, 7))
    changed = "changed while it was read"
    says = f"too early|{changed}" if change == "truncate" else changed
    with pytest.raises(CheckpointError, match=says):
        execute(plan, [model.checkpoint.storage], tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up(golden, tmp_path, monkeypatch, code):
    real, left = LocalOutput.write, [20]

    def write(self, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(self, data, offset)

    monkeypatch.setattr(LocalOutput, "write", write)
    with pytest.raises(ResourceError, match="no space left") as caught:
        convert(golden, tmp_path / "out", MANY)
    assert caught.value.exit_code == 6
    assert "free some space" in caught.value.hint
    monkeypatch.undo()
    convert(golden, tmp_path / "out", MANY)
    convert(golden, tmp_path / "undisturbed", MANY)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "undisturbed")


def convert_alone(source, target):
    """Run in a child; one thread, so that an event comes in the same place each time."""
    convert(source, target, MANY, resources=Resources(jobs=1))


@pytest.mark.parametrize("number", [1, 7, 40])
@pytest.mark.parametrize(
    ("event", "then", "error"),
    [
        ("write", fail(errno.ENOSPC), ResourceError),
        ("write", fail(errno.EIO), DestinationError),
        ("sync", fail(errno.EIO), DestinationError),
        ("rename", fail(errno.ENOSPC), ResourceError),
        ("read", fail(errno.EIO), CheckpointError),
        ("write", short, None),
        ("read", short, None),
    ],
)
def test_faults_of_the_system(golden, tmp_path, event, then, error, number):
    """At the n-th call: said in lingconv's words, or nothing but another call."""
    convert(golden, tmp_path / "undisturbed", MANY)
    target = tmp_path / "out"
    number = min(number, 18) if event == "rename" else number
    instant = Instant(event, number, then)
    ending = start(convert_alone, golden, target, at=instant).ending()
    assert ending.struck[instant] == 1
    assert isinstance(ending.error, error or type(None)), ending.err
    run(convert_alone, golden, target)
    assert tree_digest(target) == tree_digest(tmp_path / "undisturbed")


def test_a_real_limit_on_file_size(golden, tmp_path):
    """The system itself refuses to grow a file: no simulation."""
    code = (
        "import resource, signal, sys, lingconv\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try:\n"
        "    lingconv.convert(sys.argv[1], sys.argv[2])\n"
        "except lingconv.ResourceError as error:\n"
        "    print(error.message)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", code, golden, tmp_path / "out"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "no space left for" in done.stdout


def test_not_enough_disk_is_known_before_the_first_byte(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(lingconv.execution.engine, "free_bytes", lambda destination: 1000)
    with pytest.raises(ResourceError, match="1,000 are free"):
        convert(golden, tmp_path / "out", MANY)
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_not_enough_memory_is_known_before_the_first_byte(golden, tmp_path):
    with pytest.raises(ResourceError, match="the budget is 10,000") as caught:
        convert(golden, tmp_path / "out", MANY, resources=Resources(max_memory_bytes=10_000))
    assert "raise `max_memory_bytes`" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_written(golden, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), "out")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionDenied, match="Read-only file system"):
        convert(golden, tmp_path / "out", MANY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(golden, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionDenied):
        convert(golden, tmp_path / "out", MANY)


def test_a_target_that_is_a_file(golden, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DestinationError, match="not a folder"):
        convert(golden, tmp_path / "out", MANY)


def test_a_file_system_without_direct_io(golden, tmp_path, monkeypatch):
    """What cannot go past the cache goes through it, to the same bytes."""
    convert(golden, tmp_path / "direct", MANY)
    monkeypatch.setattr(os, "O_DIRECT", 0)
    convert(golden, tmp_path / "cached", MANY)
    monkeypatch.undo()
    monkeypatch.setattr(LocalOutput, "_write_direct", lambda self, data, offset: 0)
    convert(golden, tmp_path / "refused", MANY)
    assert tree_digest(tmp_path / "direct") == tree_digest(tmp_path / "cached")
    assert tree_digest(tmp_path / "direct") == tree_digest(tmp_path / "refused")


def test_a_bug_in_a_worker_is_not_swallowed(golden, tmp_path):
    with pytest.raises(ZeroDivisionError):
        convert(golden, tmp_path / "out", MANY, progress=StopAfter(1, ZeroDivisionError))


def test_a_journal_line_cut_short_by_a_kill(golden, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(lingconv.Interrupted):
        convert(golden, target, MANY, progress=StopAfter(3), resources=Resources(jobs=1))
    journal = target / ".lingconv" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert convert(golden, target, MANY).files_found_finished == 3


def test_a_lost_record_is_refused(golden, tmp_path):
    target = tmp_path / "out"
    convert(golden, target, MANY)
    (target / ".lingconv" / "run.json").write_text("{")
    with pytest.raises(DestinationError, match="has lost its record"):
        convert(golden, target, MANY)
    convert(golden, target, MANY, fresh=True)


def test_large_side_files_are_carried_in_pieces(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    data = os.urandom(9_000_001)
    (source / "assets.bin.txt").write_bytes(data)
    (source / "empty.txt").write_bytes(b"")
    convert(source, tmp_path / "out", MANY)
    assert (tmp_path / "out" / "assets.bin.txt").read_bytes() == data
    assert (tmp_path / "out" / "empty.txt").read_bytes() == b""


def test_a_record_of_another_plan_is_refused(golden, tmp_path):
    target = tmp_path / "out"
    convert(golden, target, MANY)
    edit_json(target / ".lingconv" / "run.json", lambda run: run.update(digest="other"))
    with pytest.raises(DestinationError) as caught:
        convert(golden, target, MANY)
    assert caught.value.details[0].startswith("plan: was other")
