"""Pickles: what Python and torch wrote is read; what was made to do harm does none."""

import copy
import gc
import io
import pickle
import pickletools
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lingconv.containers.megatron import (
    dcp_metadata,
    pickle_machine,
    pickle_objects,
    pickle_opcodes,
    pickle_values,
    pickles,
)
from lingconv.containers.megatron.pickle_machine import MAX_OBJECTS
from lingconv.containers.megatron.pickle_values import (
    OpaqueKey,
    OpaqueObject,
    StorageRef,
    TensorRef,
    shown,
)
from lingconv.containers.stored_tensor import HeaderError
from lingconv.encodings.dtypes import DType

# Values that were written by others ------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])) | st.binary(),
    lambda inner: st.lists(inner)
    | st.tuples(inner, inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])) | st.integers(0, 9), inner),
    max_leaves=30,
)  # fmt: skip


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(deadline=None, max_examples=300)
def test_what_python_pickled_is_what_it_was(value, protocol):
    if protocol < 3 and _holds_bytes(value):
        protocol = 3  # older ones call a codec for bytes
    assert pickles.loads(pickle.dumps(value, protocol)) == value


def _holds_bytes(value):
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(value, bytes) or (
        isinstance(value, list | tuple | dict) and any(map(_holds_bytes, inner))
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_shared_and_recursive_values_keep_their_shape(protocol):
    shared, ring = [1], []
    ring.append(ring)
    found = pickles.loads(pickle.dumps([shared, shared, ring], protocol))
    assert found[0] is found[1]
    assert found[2][0] is found[2]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_that_torch_saved(protocol):
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    state = OrderedDict(a=base, b=base[1:3], c=torch.nn.Parameter(base.float()), n=Namespace(x=3))
    state._metadata = {"version": 1}
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as archive:
        found = pickles.loads(archive.read("archive/data.pkl"))
    whole = TensorRef(StorageRef("0", DType.BF16, 24), 0, (4, 6), (6, 1))
    assert found["a"] == whole
    assert found["b"] == whole._replace(first=6, shape=(2, 6))
    assert found["c"].storage == StorageRef("1", DType.F32, 24)
    assert found["n"].state == {"x": 3}


def test_sets_tuples_and_large_numbers_as_keys_are_kept_but_never_looked_up():
    found = pickles.loads(pickle.dumps({(1, 2): "a", 2**70: "b", 3: {4}}))
    keys = [key.value for key in found if isinstance(key, OpaqueKey)]
    assert keys == [(1, 2), 2**70]
    assert (found[3].name, found[3].items) == ("builtins.set", [4])


NOTHING = pickle.PROTO + b"\x02"


def apart_step(part):
    """Return a step of the test below with nothing between its opcodes."""
    codes = part if part[:1] not in (b"c", b"h", b"K") else [part]
    return NOTHING.join(bytes([code]) if isinstance(code, int) else code for code in codes)


def apart(data):
    """Return a pickle whose opcodes have others between them that do nothing, and no frames."""
    places = [(code.name, place) for code, _, place in pickletools.genops(data)]
    ends = [place for _, place in places[1:]] + [len(data)]
    return NOTHING.join(
        data[place:end]
        for (name, place), end in zip(places, ends, strict=True)
        if name not in ("PROTO", "FRAME")
    )


def flat(value, seen):
    """Return a value as text, each object by the number that it was met as.

    `seen` holds the objects too: an address says which one it is while it lives.
    """
    if isinstance(value, OpaqueObject | dict | list):
        if id(value) in seen:
            return f"#{seen[id(value)][0]}"
        seen[id(value)] = len(seen), value
    if isinstance(value, OpaqueObject):
        return flat([value.name, value.args, value.state, [*value.items]], seen)
    inner = [*value.items()] if isinstance(value, dict) else value
    if isinstance(inner, list | tuple):
        return f"{type(value).__name__}({', '.join(flat(item, seen) for item in inner)})"
    return f"{type(value).__name__} {getattr(value, 'name', value)}"


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("axes", [0, 1, 2, 3, 4, 5])
def test_runs_of_opcodes_that_are_taken_at_once_do_what_each_of_them_does(axes, protocol):
    """The classes are torch's own; whatever follows takes from the same memo."""
    box = ChunkStorageMetadata(torch.Size((3,) * axes), torch.Size((1,) * axes))
    index = MetadataIndex("name", torch.Size((3,) * axes), 0)
    value = Metadata(
        {"a": TensorStorageMetadata(TensorProperties(), box.sizes, [box, box])}, None, {index: box}
    )
    data = pickle.dumps([value, value, index, (box.offsets, box.sizes)], protocol)
    assert flat(pickles.loads(data), {}) == flat(pickles.loads(apart(data)), {})
    assert pickle.loads(data)[0].state_dict_metadata == value.state_dict_metadata


STEPS = [
    b"\x94", b"\x85", b"R", b")", b"\x81", b"}", b"(", b"u", b"b", b"h\x00", b"\x87", b"t",
    b"K\x01", b"ctorch\nSize\n", b"cx\ny\n", b")\x81\x94}\x94(", b"\x94\x85\x94R\x94",
    b"h\x01", b"h\x02", b"h\x03", b"h\x04",
]  # fmt: skip


@given(st.lists(st.sampled_from(STEPS), max_size=40))
@example([b"(", b"K\x01", b"t", b"\x94\x85\x94R\x94", b"h\x01"])
@example([b"(", b"K\x01", b"t", b"\x94\x85\x94R\x94", b"h\x02"])
@example([b"(", b"K\x01", b"t", b"\x94\x85\x94R\x94", b"h\x03"])
@example([b")\x81\x94}\x94(", b"K\x01", b"K\x01", b"u", b"b", b"h\x01"])
@example([b")\x81\x94}\x94(", b"K\x01", b"K\x01", b"u", b"b", b"h\x02"])
@settings(deadline=None, max_examples=1_000)
def test_any_runs_of_opcodes_do_what_each_of_them_does(parts):
    outcomes = []
    together = b"".join([b"cx\ny\n", b"\x94", *parts, b"."])
    for data in (together, NOTHING.join([b"cx\ny\n", b"\x94", *map(apart_step, parts), b"."])):
        try:
            outcomes.append(flat(pickles.loads(data), {}))
        except HeaderError:
            outcomes.append("refused")
        except RecursionError:
            outcomes.append("deep")
    assert outcomes[0] == outcomes[1]


# What was made to do harm ----------------------------------------------------------------------


def snapshot():
    """Return everything that all pickles share, as values that cannot be shared with it."""
    tables = {
        f"{module.__name__}.{name}": repr(value)
        for module in (pickle_machine, pickle_objects, pickle_opcodes, pickle_values, pickles,
                       dcp_metadata)
        for name, value in vars(module).items()
        if not name.startswith("__")
    }  # fmt: skip
    members = {str(dtype): copy.deepcopy(vars(dtype)) for dtype in DType}
    functions = {
        name: (repr(call.__defaults__), repr(call.__dict__), repr(call.__kwdefaults__))
        for name, call in {**pickle_objects._CALLS, **pickle_objects.OBJECT_OPCODES}.items()
    }
    return tables, members, functions, repr(sorted(vars(DType))), gc.isenabled()


NAMES = [
    b"torch\nBFloat16Storage", b"torch\nbfloat16", b"torch\nSize", b"collections\nOrderedDict",
    b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"builtins\neval",
    b"lingconv.encodings.dtypes\nDType", b"argparse\nNamespace", b"builtins\ngetattr",
]  # fmt: skip
VALUES = [
    b"N", b"\x88", b"K\x05", b"M\xff\xff", b"J\xff\xff\xff\xff", b"]", b"}", b")", b"\x8f",
    b"\x8c\x04bits", b"\x8c\x07storage", b"X\x03\x00\x00\x00cpu", b"G" + struct.pack(">d", 2.5),
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"C\x02\xff\xfe", b"I01\n", b"F1e400\n", b"S'a\\x41'\n",
    b"V\\u00e4\n", b"L9L\n", b"(K\x01K\x02t", b"(N}t", b"\x8c\x04bitsK\x08",
    b"}(\x8c\x04bitsK\x08u",
    b"(\x8c\x07storageN\x8c\x010\x8c\x03cpuK\x04t",
]  # fmt: skip
DOERS = [code.code.encode("latin1") for code in pickletools.opcodes if code.arg is None]
MEMO = [b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"\x94", b"r\xff\xff\xff\x1f",
        b"j\x00\x00\x00\x00",
        b"p99999999\n", b"g0\n", b"\x82\x01", b"Pid\n", b"\x80\x04",
        b"\x95" + b"\xff" * 8]  # fmt: skip
HOSTILE = st.lists(
    st.sampled_from(NAMES).map(lambda name: b"c" + name + b"\n")
    | st.sampled_from(VALUES) | st.sampled_from(VALUES)
    | st.sampled_from(DOERS) | st.sampled_from([b"b", b"R", b"\x81", b"Q", b"s", b"2", b"\x86"])
    | st.sampled_from(MEMO) | st.binary(max_size=6),
    max_size=80,
).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")  # fmt: skip


def told(read, data):
    """Return what is said of the value that `data` is read as, or of why it is not."""
    try:
        return shown(read(data))
    except HeaderError as exc:
        return str(exc)


@given(HOSTILE)
@settings(deadline=None, max_examples=1_500)
def test_no_stream_of_opcodes_changes_what_others_share(data):
    before = snapshot()
    assert len(told(pickles.loads, data)) < 1_000
    assert snapshot() == before


@given(HOSTILE, st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_metadata_of_any_opcodes_is_a_directory_or_an_error(data, noise):
    for candidate in (data, noise):
        assert len(told(dcp_metadata.read_metadata, candidate)) < 20_000


@pytest.mark.parametrize(
    "target",
    [b"ctorch\nBFloat16Storage\n", b"ctorch\nbfloat16\n", b"ccollections\nOrderedDict\n",
     b"ctorch\nSize\n", b"N", b"K\x05", b"]", b")", b"\x8c\x01x", b"C\x01x",
     b"(\x8c\x07storageN\x8c\x010\x8c\x03cpuK\x04tQ"],
)  # fmt: skip
@pytest.mark.parametrize("state", [b"}(\x8c\x04bitsK\x08u", b"N}(\x8c\x04bitsK\x08u\x86"])
def test_attributes_of_what_is_no_object_are_refused(target, state):
    before = snapshot()
    with pytest.raises(HeaderError, match="attributes of"):
        pickles.loads(b"\x80\x02" + target + state + b"b.")
    assert snapshot() == before


def U(text):
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


SIZE = b"ctorch\nSize\n"
BOMBS = {
    "memo index": b"\x80\x02Nr\xff\xff\xff\x1f.",
    "memo index in text": b"\x80\x02Np4294967295\n.",
    "deep key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    "deep list": b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "deep objects": b"\x80\x02" + b"cx\ny\n)\x81" * 100_000 + b"b" * 99_999 + b".",
    "laughs as a key": b"\x80\x02})" + b"2\x86" * 64 + b"Ns.",
    "laughs as a set": b"\x80\x02(" + b")" + b"2\x86" * 64 + b"\x91.",
    "laughs as a size": b"\x80\x02" + SIZE + b")" + b"2\x86" * 64 + b"\x85R.",
    "laughs as a tensor's shape": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    b"(\x8c\x07storageN\x8c\x010\x8c\x03cpuK\x04tQK\x00" + b")" + b"2\x86" * 64 + b")tR.",
    "many marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "a text that is not there": b"\x80\x02\x8d" + b"\xff" * 7 + b"\x0f.",
    "a number that is not there": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a number of 1 MB": b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20) + b".",
    "a number of 100,000 digits": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "a frame that is not there": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "one list, copied again and again": b"\x80\x02]q\x00("
    + b"".join(b"M" + struct.pack("<H", k) + b"N\x86" for k in range(2_000)) + b"e0"
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 60_000 + b".",
    "keys of one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(40_000))
    + b"u.",
    "more lists than there may be": b"\x80\x02(" + b"]" * (MAX_OBJECTS + 1) + b"t.",
    "more tuples than there may be": b"\x80\x02)" + b"\x85" * (MAX_OBJECTS + 1) + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_few_bytes_cost_little(name, tmp_path):
    """With 1.5 GB of address space; the limit of the processor ends what has no end."""
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name])
    code = (
        "import sys\n"
        "from lingconv.containers.megatron import pickles\n"
        "from lingconv.containers.megatron.pickle_values import shown\n"
        "from lingconv.containers.stored_tensor import HeaderError\n"
        "try:\n"
        "    found = pickles.loads(open(sys.argv[1], 'rb').read())\n"
        "    print('read', shown(found)); del found\n"
        "except HeaderError as exc:\n"
        "    print('refused', str(exc)[:200]); assert len(str(exc)) < 1000\n"
    )

    def bounded():
        resource.setrlimit(resource.RLIMIT_AS, (1_500 << 20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=bounded
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("read", "refused"))
    assert "MemoryError" not in done.stdout


@given(HOSTILE)
@settings(deadline=None, max_examples=200)
def test_memory_follows_the_bytes(data):
    tracemalloc.start()
    try:
        pickles.loads(data)
    except HeaderError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 40_000 + 2_000 * len(data)


def test_every_opcode_is_run_or_refused():
    """None is left to chance: those that Python knows are all in the table."""
    inline = {"MEMOIZE", "STOP", "BINGET", "LONG_BINGET", "LONG_BINPUT", "BININT1", "BININT2"}
    known = {code.name for code in pickletools.opcodes}
    assert known == {*pickle_opcodes._NAMED, *inline}
    for code in range(256):
        if chr(code) not in {each.code for each in pickletools.opcodes}:
            with pytest.raises(HeaderError, match="no opcode"):
                pickles.loads(b"\x80\x02" + bytes([code]) + b".")


@pytest.mark.parametrize(
    "data", [b"\x80\x04\x82\x01.", b"\x80\x02Pname\n.", b"\x80\x05\x97.", b"\x80\x05N\x98.",
             b"\x80\x06N.", b"\x80\x02\x8c\x02\xed\xa0.", b"V\\ud800\n.", b""]
)  # fmt: skip
def test_what_is_not_in_the_file_is_refused(data):
    with pytest.raises(HeaderError):
        pickles.loads(data)


def test_values_are_shown_in_a_few_words():
    deep = ()
    for _ in range(100_000):
        deep = (deep, deep)
    values = [
        "x" * 10_000,
        10**5_000,
        deep,
        [deep] * 3,
        {"a": deep},
        OpaqueObject("n" * 999),
        b"\xff",
    ]
    assert all(len(shown(value)) < 150 for value in values)
    assert [shown((1, 2)), shown(None), shown(2.5)] == ["[1, 2]", "None", "2.5"]
