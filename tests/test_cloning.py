"""Bytes that are only moved: blocks that two files share, where the file system can do that."""

import errno
import os
import struct

import pytest

import lingconv
from lingconv import ConvertOptions, ResourceError
from lingconv.execution.progress import Silent
from lingconv.storage import local_output as output
from lingconv.storage.local_output import LocalOutput

BLOCK = 4096
MANY = ConvertOptions(max_shard_bytes=1_000_000)


@pytest.fixture
def aligned(golden, tmp_path):
    """A checkpoint that lingconv wrote, so that its large tensors are whole blocks."""
    lingconv.convert(golden, tmp_path / "aligned")
    return tmp_path / "aligned"


class Cloner:
    """A file system that shares blocks: it copies them, and counts."""

    def __init__(self, error: int = 0) -> None:
        self.calls = self.nbytes = 0
        self._error = error

    def ioctl(self, descriptor, request, wanted):
        assert request == output._FICLONERANGE
        source, start, nbytes, offset = struct.unpack("=qQQQ", wanted)
        assert not (start | nbytes | offset) % BLOCK
        self.calls += 1
        if self._error:
            raise OSError(self._error, os.strerror(self._error))
        assert os.pwrite(descriptor, os.pread(source, nbytes, start), offset) == nbytes
        self.nbytes += nbytes


class Sum(Silent):
    def __init__(self):
        self.written = 0

    def advance(self, name, nbytes):
        self.written += nbytes


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def test_what_is_shared_is_what_would_be_written(aligned, tmp_path, monkeypatch):
    lingconv.convert(aligned, tmp_path / "written", MANY)
    cloner, progress = Cloner(), Sum()
    monkeypatch.setattr(output.fcntl, "ioctl", cloner.ioctl)
    result = lingconv.convert(aligned, tmp_path / "shared", MANY, progress=progress)
    assert contents(tmp_path / "shared") == contents(tmp_path / "written")
    # A file's last strip has its small tensors, and is read: of files this small, most of them.
    assert cloner.nbytes > result.bytes_written / 4
    elements = result.bytes_written - progress.written  # what is left are headers
    assert 0 < elements < result.bytes_written / 20


def test_stacked_experts_share_blocks_too(aligned, tmp_path, monkeypatch):
    stacked = ConvertOptions(layout="hf-merged")
    lingconv.convert(aligned, tmp_path / "written", stacked)
    cloner = Cloner()
    monkeypatch.setattr(output.fcntl, "ioctl", cloner.ioctl)
    lingconv.convert(aligned, tmp_path / "shared", stacked)
    assert cloner.nbytes > 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "written")


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, 524])
def test_a_file_system_is_asked_once_for_each_file(aligned, tmp_path, monkeypatch, error):
    cloner = Cloner(error)
    monkeypatch.setattr(output.fcntl, "ioctl", cloner.ioctl)
    files = lingconv.convert(aligned, tmp_path / "out", MANY).files_written
    assert 0 < cloner.calls <= files
    assert lingconv.verify(aligned, tmp_path / "out").ok


def test_a_full_disk_is_no_reason_to_write_instead(aligned, tmp_path, monkeypatch):
    monkeypatch.setattr(output.fcntl, "ioctl", Cloner(errno.ENOSPC).ioctl)
    with pytest.raises(ResourceError, match="no space left"):
        lingconv.convert(aligned, tmp_path / "out", MANY)


def test_what_must_be_summed_up_or_decoded_is_read(aligned, tmp_path, monkeypatch):
    cloner = Cloner()
    monkeypatch.setattr(output.fcntl, "ioctl", cloner.ioctl)
    lingconv.convert(aligned, tmp_path / "dist", ConvertOptions(layout="megatron"))
    assert not cloner.calls


def test_a_real_file_system_shares_what_it_can(tmp_path):
    """Run the tests with `--basetemp` on XFS or Btrfs to see it do so."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(4 * BLOCK))
    blob = LocalOutput(target, 4 * BLOCK)
    blob.reserve()
    with source.open("rb") as file:
        could = blob.clone(file.fileno(), BLOCK, 2 * BLOCK, 2 * BLOCK)
    if not could:
        blob.close()
        pytest.skip("the file system here shares no blocks")
    blob.sync()
    expected = bytes(2 * BLOCK) + source.read_bytes()[BLOCK : 3 * BLOCK]
    assert target.read_bytes() == expected
    blob.write(memoryview(b"changed"), 2 * BLOCK)
    blob.close()
    assert b"changed" not in source.read_bytes()
