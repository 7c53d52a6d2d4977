"""Checksums that archives state of their elements, compared while these are read."""

import shutil
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lingconv
from lingconv.execution.resources import Resources
from lingconv.plans.options import ConvertOptions
from lingconv.plans.plan import Plan
from lingconv.storage.stated_sums import CheckedBlob, StatedSum
from tests.support import assert_same_model

RANK = "iter_0000001/mp_rank_00/model_optim_rng.pt"
FILES = {"megatron": "iter_0000001/__0_0.distcp", "megatron-ranks": RANK}


class Bytes:
    """A file in memory that counts what is read of it."""

    descriptor = None

    def __init__(self, data):
        self.data = data
        self.read = np.zeros(len(data), int)

    def expect(self, offset, nbytes):
        pass

    def read_into(self, offset, buffer):
        buffer[:] = self.data[offset : offset + len(buffer)]
        self.read[offset : offset + len(buffer)] += 1

    def close(self):
        pass


def read(blob, offset, nbytes):
    blob.read_into(offset, memoryview(bytearray(nbytes)))


@given(st.binary(min_size=9, max_size=300), st.data())
@settings(deadline=None, max_examples=300)
def test_pieces_in_any_order_find_a_flipped_bit_and_nothing_else(data, draw):
    """The checksum is zlib's; pieces overlap, repeat, and leave holes that `complete` reads."""
    first = draw.draw(st.integers(0, len(data) - 2))
    nbytes = draw.draw(st.integers(1, len(data) - first))
    stated = StatedSum(first, nbytes, zlib.crc32(data[first : first + nbytes]))
    pieces = draw.draw(
        st.lists(
            st.integers(0, len(data) - 1).flatmap(
                lambda start: st.tuples(st.just(start), st.integers(1, len(data) - start))
            ),
            max_size=8,
        )
    )
    whole = Bytes(data)
    sound = CheckedBlob(whole, "x", [stated])
    for start, count in pieces:
        read(sound, start, count)
    sound.complete(stated)
    assert whole.read[first : first + nbytes].all()
    place = draw.draw(st.integers(0, len(data) - 1))
    flipped = bytearray(data)
    flipped[place] ^= 1 << draw.draw(st.integers(0, 7))

    def run():
        blob = CheckedBlob(Bytes(bytes(flipped)), "x", [stated])
        for start, count in pieces:
            read(blob, start, count)
        blob.complete(stated)

    if first <= place < first + nbytes:
        with pytest.raises(lingconv.CheckpointError, match="is damaged"):
            run()
    else:
        run()


def test_what_was_compared_is_not_read_again():
    data = bytes(range(200))
    blob = Bytes(data)
    stated = StatedSum(50, 100, zlib.crc32(data[50:150]))
    checked = CheckedBlob(blob, "x", [stated])
    for start in (120, 50, 90):
        read(checked, start, 30)
    checked.complete(stated)
    assert blob.read[50:150].tolist() == [1] * 100


def flip_in_elements(path):
    """Flip a bit in the middle of the largest record of the first archive in a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("dtype", [None, "fp8"])
def test_a_flipped_bit_is_never_converted(golden, layout, dtype, tmp_path):
    source = tmp_path / "m"
    lingconv.convert(golden, source, ConvertOptions(layout=layout))
    path = source / FILES[layout]
    flip_in_elements(path)
    options = ConvertOptions(dtype=dtype) if dtype else None
    for _ in range(2):  # what the first run left behind is no way around it
        with pytest.raises(lingconv.CheckpointError, match="is damaged") as caught:
            lingconv.convert(source, tmp_path / "hf", options)
        assert str(path) in str(caught.value)
        assert not list((tmp_path / "hf").glob("*.safetensors"))


def test_what_one_run_finished_is_no_way_around_a_damaged_range_for_the_next(golden, tmp_path):
    """The experts of a layer are one range, and lie in several files of the target."""
    source = tmp_path / "m"
    lingconv.convert(golden, source, ConvertOptions(layout="megatron"))
    options = ConvertOptions(max_shard_bytes=300_000)
    plan = lingconv.plan(source, options)
    (sums,) = plan.sources[0].checksums.values()
    homes = {
        stated: {
            file.name
            for file in plan.files
            for transfer in file.transfers
            for segment in transfer.segments
            if stated.offset <= segment.source.extents[0].offset < stated.offset + stated.nbytes
        }
        for stated in sums
    }
    stated = max(homes, key=lambda item: len(homes[item]))
    assert len(homes[stated]) > 2
    path = source / FILES["megatron"]
    data = bytearray(path.read_bytes())
    data[stated.offset] ^= 1
    path.write_bytes(data)
    finished = []
    for _ in range(3):
        with pytest.raises(lingconv.CheckpointError, match="is damaged"):
            lingconv.convert(source, tmp_path / "hf", options, resources=Resources(jobs=1))
        finished.append(len(list((tmp_path / "hf").glob("*.safetensors"))))
    assert finished[0] > 0  # what they do not share is there


def test_zip_says_the_same_of_the_damaged_record(golden, tmp_path):
    source = tmp_path / "m"
    lingconv.convert(golden, source, ConvertOptions(layout="megatron-ranks"))
    with zipfile.ZipFile(source / RANK) as archive:
        assert archive.testzip() is None
    flip_in_elements(source / RANK)
    with zipfile.ZipFile(source / RANK) as archive:
        assert archive.testzip().startswith("archive/data/")


def test_torch_without_checksums_is_read(golden, tmp_path):
    """torch writes zeros when it is told to compute none."""
    source = tmp_path / "m"
    lingconv.convert(golden, source, ConvertOptions(layout="megatron-ranks"))
    state = torch.load(source / RANK, weights_only=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, source / RANK)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(source / RANK) as archive:
        assert {item.CRC for item in archive.infolist()} == {0}
    lingconv.convert(source, tmp_path / "hf")
    assert_same_model(golden, tmp_path / "hf")


def test_a_plan_keeps_them(golden, tmp_path):
    source = tmp_path / "m"
    lingconv.convert(golden, source, ConvertOptions(layout="megatron"))
    plan = lingconv.plan(source)
    (sums,) = plan.sources[0].checksums.values()
    assert Plan.from_json(plan.to_json()).sources == plan.sources
    data = (source / FILES["megatron"]).read_bytes()
    assert {zlib.crc32(data[s.offset : s.offset + s.nbytes]) == s.crc for s in sums} == {True}
    shutil.rmtree(source)
