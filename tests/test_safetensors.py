"""The header parser trusts nothing; the header writer satisfies the real library."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from lingconv.containers.hf.safetensors import (
    build_header,
    header_length,
    parse_header,
    shard_name,
    storage_order,
)
from lingconv.containers.stored_tensor import HeaderError
from lingconv.encodings.dtypes import DType
from lingconv.encodings.tensor_spec import tensor_spec
from lingconv.storage import BLOCK_BYTES


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def parse(header, data_bytes=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(text, 8 + len(text) + data_bytes, "x.safetensors")[:2]


def test_a_good_header():
    entries, faults = parse({"__metadata__": {"format": "pt"}, "a": entry()})
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in entries] == [("a", DType.F32, (2,), 8)]
    assert faults == []


@pytest.mark.parametrize(
    ("header", "data_bytes", "says"),
    [
        ({"a": entry(offsets=(0, 80))}, 8, "outside"),
        ({"a": entry(offsets=(8, 0))}, 8, "outside"),
        ({"a": entry(offsets=(-8, 0))}, 8, "where a size must be"),
        ({"a": entry(shape=(3,))}, 8, "does not take 8 bytes"),
        ({"a": entry(shape=(1.0, 2))}, 8, "where a size must be"),
        ({"a": entry(shape=(True, 2))}, 8, "where a size must be"),
        ({"a": entry(dtype="F99")}, 8, "unknown dtype 'F99'"),
        ({"a": entry(dtype=["F32"])}, 8, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": 7}, 8, "must be an object"),
        ({"a": entry(), "b": entry()}, 8, "overlaps"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "overlaps"),
        ({"a": entry(offsets=(8, 16))}, 16, "hole of 8 bytes"),
        ({"a": entry()}, 12, "4 bytes behind the last tensor"),
        ({"a": entry(dtype="F4", shape=(1,), offsets=(0, 0))}, 0, "does not take 0 bytes"),
    ],
)
def test_a_bad_entry_is_a_fault_that_names_file_and_tensor(header, data_bytes, says):
    _, faults = parse(header, data_bytes)
    assert len(faults) == 1
    assert says in faults[0].message
    assert faults[0].file == "x.safetensors"
    if "behind" not in says:
        assert faults[0].tensor in header


def test_a_file_that_is_cut_short_is_one_fault():
    """Of 8 + 8 + 8 bytes of data 12 are there: two tensors are not, and no third line says so."""
    listed = {name: entry(offsets=(8 * i, 8 * i + 8)) for i, name in enumerate("abc")}
    text = json.dumps(listed).encode()
    tensors, faults, unread = parse_header(text, 8 + len(text) + 12, "x.safetensors")
    assert [item.name for item in tensors] == ["a"]
    assert unread == ["b", "c"]
    assert [str(fault) for fault in faults] == [
        f"x.safetensors: truncated file: {20 + len(text)} bytes, its tensors reach to byte"
        f" {32 + len(text)} (c)"
    ]
    assert faults[0].hint == "fetch the file again"


def test_a_tensor_listed_twice_is_a_fault():
    one = json.dumps(entry())
    _, faults = parse(f'{{"a": {one}, "a": {one}}}'.encode())
    assert [str(fault) for fault in faults] == [
        "x.safetensors: a: tensor is listed twice in one header"
    ]


def test_a_field_given_twice_is_a_fault():
    text = b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}'
    assert "exactly" in parse(text)[1][0].message


@pytest.mark.parametrize("text", [b"", b"[]", b"7", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_no_object(text):
    with pytest.raises(HeaderError):
        parse(text)


@pytest.mark.parametrize(
    ("prefix", "size", "says"),
    [
        (b"", 0, "too short"),
        (b"1234567", 7, "too short"),
        (struct.pack("<Q", 1000), 500, "truncated"),
        (struct.pack("<Q", 2**63), 2**62, "limit of 100 MB"),
    ],
)
def test_a_header_that_does_not_fit_its_file(prefix, size, says):
    with pytest.raises(HeaderError, match=says):
        header_length(prefix, size)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DType, "F7"]) | json_values,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 99), max_size=3) | json_values,
    }
)


@settings(max_examples=400)
@given(
    header=st.dictionaries(st.text(max_size=6), near_entries | json_values, max_size=5),
    data_bytes=st.integers(0, 99),
)
def test_no_header_gets_past_the_parser_that_the_real_library_refuses(
    header, data_bytes, tmp_path_factory
):
    text = json.dumps(header).encode()
    entries, faults, _ = parse_header(text, 8 + len(text) + data_bytes, "f")
    for item in entries:
        assert (
            8 + len(text) <= item.offset <= item.offset + item.nbytes <= 8 + len(text) + data_bytes
        )
    if not faults:
        path = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data_bytes))
        try:
            with safe_open(path, "np") as file:
                assert set(file.keys()) == {item.name for item in entries}
        except SafetensorError as exc:
            # The library also checks what we pass over: the form of __metadata__.
            assert "__metadata__" in header, exc  # noqa: PT017


@settings(max_examples=200)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_or_understood(data):
    try:
        length = header_length(data[:8], len(data))
        parse_header(data[8 : 8 + length], len(data), "f")
    except HeaderError:
        pass


specs = st.lists(
    st.tuples(
        st.sampled_from([DType.BF16, DType.F32, DType.F8_E4M3, DType.F64]),
        st.lists(st.sampled_from([1, 3, 7, 64, 512, 4096]), max_size=2).map(tuple),
    ),
    max_size=12,
).map(lambda items: [tensor_spec(f"t{i}", *item) for i, item in enumerate(items)])


@settings(max_examples=60)
@given(specs=specs)
def test_written_headers_open_in_the_real_library_with_every_tensor_aligned(
    specs, tmp_path_factory
):
    ordered = storage_order(specs)
    header = build_header(ordered)
    assert len(header) % BLOCK_BYTES == 0
    path = tmp_path_factory.mktemp("header") / "f.safetensors"
    path.write_bytes(header + bytes(sum(spec.nbytes for spec in specs)))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {spec.name for spec in specs}
        for spec in specs:
            assert tuple(file.get_slice(spec.name).get_shape()) == spec.shape
    entries, faults, _ = parse_header(header[8:], path.stat().st_size, "f")
    assert not faults
    for item in entries:
        assert item.offset % item.dtype.itemsize == 0
        assert item.nbytes % BLOCK_BYTES or not item.nbytes or item.offset % BLOCK_BYTES == 0


def test_shard_names_are_those_of_transformers():
    assert shard_name(0, 1) == "model.safetensors"
    assert shard_name(154, 155) == "model-00155-of-00155.safetensors"
