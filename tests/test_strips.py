"""Targets that are put together from rows of several sources, cut anywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lingconv.plans.lowering
from lingconv.encodings import Fp8, Plain
from lingconv.encodings.dtypes import DType
from lingconv.execution.pipeline.transcoder import Transcoder
from lingconv.plans.lowering import CopyStrip, lower
from lingconv.plans.plan import OutputFile, Scaling, Source, Term, Transfer
from lingconv.plans.tensor_map import ByteRange, StoredMatrix
from lingconv.storage.aligned_buffers import Arena
from lingconv.storage.local_output import LocalOutput
from tests.support import E4M3, reference_dequantize, reference_quantize

BF16, F32 = Plain(DType.BF16), Plain(DType.F32)
BLOCK = Fp8(128, 128, "_scale_inv", DType.F32)
SCALING = Scaling(0.0, power_of_two=False)


class Bytes:
    """A blob in memory."""

    def __init__(self, data):
        self.data = data

    def read_into(self, offset, buffer):
        buffer[:] = self.data[offset : offset + len(buffer)]


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def store(name, weight, encoding, blobs):
    """Put a matrix into memory in an encoding; return where it is, and its values as stored."""
    if isinstance(encoding, Fp8):
        codes, scales = reference_quantize(weight)
        parts, values = (
            [raw(codes), raw(scales)],
            reference_dequantize(codes, scales, dtype=torch.float32),
        )
    else:
        kept = weight.to(torch.bfloat16 if encoding == BF16 else torch.float32)
        parts, values = [raw(kept)], kept.float()
    blobs[name] = Bytes(b"".join(parts))
    extents, offset = [], 0
    for part in parts:
        extents.append(ByteRange(name, offset, len(part)))
        offset += len(part)
    return StoredMatrix(name, tuple(weight.shape), encoding, tuple(extents)), values


def fill(path, transfer, blobs):
    """Run all strips of a file that holds one matrix; return the bytes of its tensors."""
    target = transfer.target
    specs = target.encoding.tensors(target.name, target.shape)
    extents, offset = [], 0
    for spec in specs:
        extents.append(ByteRange("out", offset, spec.nbytes))
        offset += spec.nbytes
    placed = transfer._replace(target=target._replace(extents=tuple(extents)))
    output = LocalOutput(path, offset)
    transcoder = Transcoder(Arena(), [blobs], [Source("", {})], allow_nonfinite=False)
    written = 0
    for strip in lower(OutputFile("out", offset, specs, (placed,))):
        if isinstance(strip, CopyStrip):
            data = b""
            for source in strip.sources:
                part = bytearray(source.nbytes)
                blobs[source.file].read_into(source.offset, memoryview(part))
                data += part
            written += output.write(memoryview(data), strip.offset)
        else:
            written += transcoder.run(strip, output)
    output.sync()
    output.close()
    assert written == offset
    data = path.read_bytes()
    return [data[e.offset : e.offset + e.nbytes] for e in extents]


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    skips=st.lists(st.integers(0, 150), min_size=4, max_size=4),
    cols=st.integers(1, 260),
    source=st.sampled_from([BF16, F32, BLOCK]),
    target=st.sampled_from([BF16, F32, BLOCK]),
    strip_bytes=st.sampled_from([1, 50_000, 4 << 20]),
)
def test_rows_of_several_sources(rows, skips, cols, source, target, strip_bytes, tmp_path_factory):
    """Fill a target from the middles of several matrices; compare with torch."""
    blobs, segments, pieces = {}, [], []
    generator = torch.Generator().manual_seed(sum(rows) + cols)
    for number, (count, skip) in enumerate(zip(rows, skips, strict=False)):
        weight = torch.randn(count + skip, cols, generator=generator) * 0.02
        stored, values = store(f"s{number}", weight, source, blobs)
        segments += stored.segments(skip, count)
        pieces.append(values[skip:])
    expected = torch.cat(pieces)
    copies = source == target and source != BLOCK
    transfer = Transfer(
        StoredMatrix("w", tuple(expected.shape), target, ()),
        (Term((0,), tuple(segments)),),
        SCALING,
        copies,
    )
    before = lingconv.plans.lowering.STRIP_BYTES
    lingconv.plans.lowering.STRIP_BYTES = strip_bytes
    try:
        found = fill(tmp_path_factory.mktemp("strips") / "out", transfer, blobs)
    finally:
        lingconv.plans.lowering.STRIP_BYTES = before
    if target == BLOCK:
        codes, scales = reference_quantize(expected)
        assert found == [raw(codes), raw(scales)]
    else:
        assert found == [raw(expected.bfloat16() if target == BF16 else expected)]


@pytest.mark.parametrize("splits", [(256, 128), (128, 256), (128, 128, 100), (384,)])
def test_fp8_blocks_are_copied_with_their_scales(splits, tmp_path):
    """Where segments end at block borders, codes and scales move as they are."""
    weight = torch.randn(512, 200) * 0.02
    blobs = {}
    stored, _ = store("s", weight, BLOCK, blobs)
    segments, first = [], 512
    for count in splits:  # taken from the end, so that nothing joins up by itself
        first -= count if count % 128 == 0 else 128
        segments += stored.segments(first, count)
    total = sum(splits)
    terms = (Term((0,), tuple(segments)),)
    transfer = Transfer(StoredMatrix("w", (total, 200), BLOCK, ()), terms, SCALING, copies=True)
    found = fill(tmp_path / "out", transfer, blobs)
    codes, scales = reference_quantize(weight)
    rows = [row for s in segments for row in range(s.first_row, s.first_row + s.num_rows)]
    blocks = [
        b
        for s in segments
        for b in range(s.first_row // 128, -(-(s.first_row + s.num_rows) // 128))
    ]
    assert found == [raw(codes.view(torch.uint8)[rows]), raw(scales[blocks])]
    assert codes.dtype == E4M3
    assert np.frombuffer(found[1], np.float32).shape == (len(blocks) * 2,)


def test_a_file_that_is_closed_reserves_nothing_of_the_next_one(tmp_path):
    """The system gives the number of a closed file to the next one that is opened."""
    first = LocalOutput(tmp_path / "first", 1 << 20)
    first.close()
    second = LocalOutput(tmp_path / "second", 10)
    first.reserve()
    second.close()
    assert (tmp_path / "second").stat().st_size == 10
