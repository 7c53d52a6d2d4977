"""Megatron's files with values that nobody expects: an error that names the file, never a crash."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from argparse import Namespace
from contextlib import suppress

import pytest
import torch

import lingconv
from lingconv.containers.megatron.pickles import Global, Instance, Pairs, dumps
from lingconv.containers.megatron.rank_assembly import find_parallel
from lingconv.containers.megatron.torch_archive import ArchiveReader, build_archive
from lingconv.containers.stored_tensor import HeaderError
from lingconv.errors import UsageError
from lingconv.plans.options import ConvertOptions

ITERATION = "iter_0000001"
RANK = f"{ITERATION}/mp_rank_00/model_optim_rng.pt"
ODD = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**12, 10**600, 2.5, float("nan"), float("inf"), "",
    "8",    "x" * 9_000, b"\xff\xfe", [], [[[]]], {}, {"a": {"b": 1}}, (), (1,) * 70, {1, 2},
    torch.bfloat16, Namespace(x=1), complex(1, 2), [None] * 20_000, torch.ones(2),
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(golden, tmp_path_factory):
    """Return the golden model in both of Megatron's formats."""
    root = tmp_path_factory.mktemp("megatron")
    for layout in ("megatron", "megatron-ranks"):
        lingconv.convert(golden, root / layout, ConvertOptions(layout=layout))
        (root / layout / "config.json").unlink(missing_ok=True)
    return root


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def told(source):
    """Return what is said of a source, as an error or as faults; anything else is raised."""
    try:
        report = lingconv.inspect(source)
    except lingconv.CheckpointError as exc:
        return "\n".join([exc.message, *exc.details, *map(str, exc.faults)])
    with suppress(lingconv.UsageError, lingconv.CheckpointError):
        lingconv.plan(source)
    return "\n".join(map(str, report.faults))


KEYS = [
    "num_layers", "num_experts", "hidden_size", "padded_vocab_size", "mtp_num_layers",
    "params_dtype", "kv_channels", "moe_layer_freq", "rotary_percent",
]  # fmt: skip
WORLD = [
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_odd_arguments_of_torch_dist(sources, key, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron", source)
    path = source / ITERATION / "common.pt"
    state = torch.load(path, weights_only=False)
    for value in ODD:
        setattr(state["args"], key, value)
        path.write_bytes(saved(state))
        assert len(told(source)) < 200_000


@pytest.mark.parametrize("key", [*WORLD, "num_layers", "num_experts"])
def test_odd_arguments_of_ranks(sources, key, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron-ranks", source)
    state = torch.load(source / RANK, weights_only=False)
    for value in ODD:
        setattr(state["args"], key, value)
        (source / RANK).write_bytes(saved(state))
        text = told(source)
        if key in WORLD and type(value) in (str, float, list, dict) and value:
            assert key in text, (value, text)


@pytest.mark.parametrize("model", ODD, ids=lambda value: type(value).__name__)
def test_odd_models_of_a_rank(sources, model, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron-ranks", source)
    state = torch.load(source / RANK, weights_only=False)
    ring = []
    ring.append(ring)
    for key, change in (
        ("model", {"model": model}),
        ("model", {"model": {**state["model"], 5: torch.ones(3), "x" * 9_000: torch.ones(1)}}),
        ("modelx", {"modelx": state["model"]}),
        ("model4000000000", {"model4000000000": state["model"]}),
        ("ring", {"ring": ring, "odd": model}),
    ):
        (source / RANK).write_bytes(saved({**state, **change}))
        text = told(source)
        assert key != "model" or "model_optim_rng.pt" in text


def test_names_of_ranks_are_no_numbers_of_ranks(sources, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron-ranks", source)
    (source / ITERATION / "mp_rank_00").rename(source / ITERATION / "mp_rank_99999999")
    assert "1 folders are there" in told(source)


@pytest.mark.parametrize(
    ("names", "args"),
    [
        (["mp_rank_99999999/model/x"], {}),
        (["mp_rank_00_99999999/model/x"], {}),
        (["mp_rank_00/model9999/x"], {}),
        (["mp_rank_00/model/x"], {WORLD[0]: 10**9}),
        (["mp_rank_00/model/x"], {WORLD[1]: 10**8}),
        (["mp_rank_00/model/x"], {WORLD[3]: "8"}),
        (["mp_rank_00/model/x"], {WORLD[2]: [4]}),
        (["mp_rank_00/model/x"], {WORLD[2]: True}),
    ],
)
def test_ranks_that_cannot_all_be_missing(names, args):
    with pytest.raises(UsageError):
        find_parallel(names, args)


# .metadata -------------------------------------------------------------------------------------

MODULE = "torch.distributed.checkpoint.metadata"
BF16 = Global("torch", "bfloat16")


def metadata(size=(256,), boxes=(((0,), (256,)),), properties=(BF16,), name="n", place=None):
    """Return `.metadata` with one tensor."""
    fields = {
        "properties": Instance(Global(MODULE, "TensorProperties"), properties),
        "size": size,
        "chunks": [
            Instance(Global(MODULE, "ChunkStorageMetadata"), {"offsets": first, "sizes": sizes})
            for first, sizes in boxes
        ],
    }
    where = {"relative_path": "__0_0.distcp", "offset": 0, "length": 100, **(place or {})}
    info = Instance(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), where)
    index = [
        (Instance(Global(MODULE, "MetadataIndex"), {"fqn": name, "offset": first}), info)
        for first, _ in boxes
    ]
    state = {
        "state_dict_metadata": Pairs(
            ((name, Instance(Global(MODULE, "TensorStorageMetadata"), fields)),)
        ),
        "storage_data": Pairs(tuple(index)),
    }
    return dumps(Instance(Global(MODULE, "Metadata"), state))


DUMPED = [None, True, -1, 2**64, 10**600, 2.5, "8", [], {}, (), ("a",), (-1,), (2**64,), (1,) * 70,
          ((1,),), (None,), (2**63 - 1,) * 60]  # fmt: skip


@pytest.mark.parametrize("value", DUMPED, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(
    "field", ["size", "offsets", "sizes", "properties", "name", "relative_path", "offset", "length"]
)
def test_odd_values_of_metadata(sources, field, value, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron", source)
    if field in ("offsets", "sizes"):
        box = (value, (256,)) if field == "offsets" else ((0,), value)
        data = metadata(boxes=(box,))
    elif field in ("relative_path", "offset", "length"):
        data = metadata(place={field: value})
    elif isinstance(value, list | dict) and field == "name":
        return  # no key of a dictionary
    elif field == "properties" and not isinstance(value, tuple | dict):
        data = metadata(properties={"dtype": value})
    else:
        data = metadata(**{field: value})
    (source / ITERATION / ".metadata").write_bytes(data)
    text = told(source)
    assert ".metadata" in text or "distcp" in text, text


def test_tensors_of_all_layers_are_counted_together(sources, tmp_path):
    """300 of 100,000 layers each are 30 million parts; the files have a few thousand bytes."""
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron", source)
    path = source / ITERATION / ".metadata"
    found = pickle.loads(path.read_bytes())
    item = next(i for i in found.state_dict_metadata.values() if hasattr(i, "chunks"))
    for number in range(300):
        item.size = torch.Size((100_000, 1))
        found.state_dict_metadata[f"decoder.layers.x{number}.weight"] = item
    path.write_bytes(pickle.dumps(found))
    assert ".metadata" in told(source) or "distcp" in told(source)


def test_a_list_of_chunks_that_many_tensors_share(sources, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron", source)
    path = source / ITERATION / ".metadata"
    found = pickle.loads(path.read_bytes())
    item = next(i for i in found.state_dict_metadata.values() if hasattr(i, "chunks"))
    item.chunks *= 2_000
    found.state_dict_metadata.update({f"x{number}": item for number in range(1_000)})
    path.write_bytes(pickle.dumps(found))
    assert "far more chunks" in told(source)


# Archives --------------------------------------------------------------------------------------


def archive():
    parts = build_archive(0, dumps({"a": 1}), {}).parts
    return bytearray(b"".join(part.data for part in parts))


def opened(data):
    reader = ArchiveReader(lambda at, count: bytes(data[at : at + count]), len(data))
    return reader.record("data.pkl", 1 << 20)


def test_zip_reads_what_the_archive_reads():
    with zipfile.ZipFile(io.BytesIO(archive())) as judge:
        assert judge.read("archive/data.pkl") == opened(archive())


@pytest.mark.parametrize("at", ["data", "name", "crc", "comment", "count"])
def test_lies_of_an_archive(at):
    data = archive()
    central, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    if at == "data":
        data[data.index(b"\x80\x02") + 3] ^= 1
    elif at == "name":
        data[30] ^= 1
    elif at == "crc":
        data[central + 16] ^= 1
    elif at == "comment":
        data += b"trailing"
    else:
        struct.pack_into("<H", data, end + 10, 2)
    with pytest.raises(HeaderError):
        opened(data)


def test_records_inside_of_one_another(golden):
    data = archive()
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 1)
    struct.pack_into("<I", data, second + 42, 10)
    with pytest.raises(HeaderError, match="inside of another"):
        opened(data)


@pytest.mark.parametrize("place", range(0, 600, 7))
def test_any_flipped_byte_of_a_small_archive_is_the_same_or_an_error(place):
    data = archive()
    data[place % len(data)] ^= 0x41
    with suppress(HeaderError):
        assert opened(data) == opened(archive())


@pytest.mark.parametrize("word", [b"", b"x", b"-1", b"9" * 60, b"\xff\xfe", b"\xd9\xa1", b"../x"])
def test_odd_trackers(sources, word, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron", source)
    (source / "latest_checkpointed_iteration.txt").write_bytes(word)
    with pytest.raises(lingconv.CheckpointError, match="latest_checkpointed_iteration"):
        lingconv.inspect(source)


@pytest.mark.parametrize(
    "word", [b"", b"5", b"[]", b"\xff", b'{"sharded_backend": 5}', b"[" * 9999]
)
def test_odd_names_of_the_format(sources, word, tmp_path):
    """metadata.json says nothing that `.metadata` does not show."""
    source = tmp_path / "m"
    shutil.copytree(sources / "megatron", source)
    (source / ITERATION / "metadata.json").write_bytes(word)
    assert json.dumps(told(source))
