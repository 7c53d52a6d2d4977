"""Object stores: S3, by its usual client, as a source and as a target."""

import json
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

import lingconv
from lingconv import (
    CheckpointError,
    ConvertOptions,
    DestinationError,
    GgufOptions,
    NetworkError,
    PermissionDenied,
    PublishOptions,
    Resources,
    UsageError,
    convert,
)
from lingconv.storage import byte_ranges as ranges
from lingconv.storage.object_store import list_objects
from lingconv.storage.object_upload import ObjectUpload
from tests.hub_support import watched, weight_bytes
from tests.s3_server import BUCKET, client, listing, s3

MANY = ConvertOptions(dtype="fp8", max_shard_bytes=300_000)


@pytest.fixture(scope="module")
def server():
    with s3() as environment:
        yield environment


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    """An empty bucket, and a home for what is staged; yields the address of the bucket."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ranges, "SMALL_BYTES", 1000)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(ranges, "REQUEST_BYTES", 100_000)
    fsspec.filesystem("s3").clear_instance_cache()
    system = client()
    system.mkdir(BUCKET)
    yield f"s3://{BUCKET}"
    system.rm(BUCKET, recursive=True)


def upload(folder, name):
    for path in Path(folder).iterdir():
        client().put_file(str(path), f"{BUCKET}/{name}/{path.name}")


def weights(files):
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def local_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_a_checkpoint_is_read_from_a_store(store, golden, tmp_path):
    upload(golden, "tiny")
    seen, held = lingconv.inspect(f"{store}/tiny"), lingconv.inspect(golden)
    assert seen.parameters == held.parameters > 0
    convert(f"{store}/tiny", tmp_path / "far", MANY)
    convert(golden, tmp_path / "near", MANY)
    assert weights(local_files(tmp_path / "far")) == weights(local_files(tmp_path / "near"))
    verdict = lingconv.verify(f"{store}/tiny", tmp_path / "far")
    assert verdict.ok


def test_a_folder_that_another_writer_makes_meanwhile_is_no_file():
    """`s3fs` finds no file, asks what the name itself is, and lists that: now a folder."""
    folder = {"Key": "models/out", "name": "models/out", "type": "directory", "size": 0}
    system = SimpleNamespace(find=lambda root, detail: {root: folder})
    assert list_objects(system, "models/out", "s3://models/out") == {}


def test_a_checkpoint_is_written_to_a_store(store, golden, tmp_path):
    convert(golden, tmp_path / "near", MANY)
    largest = max(path.stat().st_size for path in (tmp_path / "near").glob("*.safetensors"))
    with watched(lambda: weight_bytes(tmp_path / "home")) as disk:
        result = convert(golden, f"{store}/out/fp8", MANY)
    assert result.destination == f"{store}/out/fp8"
    found, wanted = listing("out/fp8"), local_files(tmp_path / "near")
    records = [json.loads(files.pop("lingconv.json")) for files in (found, wanted)]
    assert found == wanted
    assert records[0]["options"] == records[1]["options"]
    assert str(golden) not in json.dumps(records[0])
    assert 0 < max(disk) <= 2 * largest
    assert weight_bytes(tmp_path / "home") == 0
    again = convert(golden, f"{store}/out/fp8", MANY)
    assert (again.files_written, again.files_found_finished) == (0, result.files_written)


def test_gguf_both_ways(store, golden, tmp_path):
    gguf = ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="q8_0"))
    convert(golden, f"{store}/gguf/tiny.gguf", gguf)
    convert(golden, tmp_path / "tiny.gguf", gguf)
    assert listing("gguf") == {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()}
    back = ConvertOptions(dtype="bf16")
    convert(f"{store}/gguf/tiny.gguf", tmp_path / "far", back)
    convert(tmp_path / "tiny.gguf", tmp_path / "near", back)
    assert weights(local_files(tmp_path / "far")) == weights(local_files(tmp_path / "near"))


def test_a_run_goes_on_and_sends_nothing_twice(store, golden, tmp_path, monkeypatch):
    sent, put = [], ObjectUpload._put

    def failing(self, name, content):
        if len(sent) == 3:
            raise NetworkError("the store went away")
        sent.append(name)
        return put(self, name, content)

    monkeypatch.setattr(ObjectUpload, "_put", failing)
    with pytest.raises(NetworkError, match="went away"):
        convert(golden, f"{store}/out", MANY)
    assert "model.safetensors.index.json" not in listing("out")
    assert len(weights(listing("out"))) == 3

    def counting(self, name, content):
        sent.append(name)
        return put(self, name, content)

    monkeypatch.setattr(ObjectUpload, "_put", counting)
    convert(golden, f"{store}/out", MANY)
    assert len(sent) == len(set(sent))
    convert(golden, tmp_path / "near", MANY)
    assert weights(listing("out")) == weights(local_files(tmp_path / "near"))


def test_what_somebody_changed_is_sent_again(store, golden, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ObjectUpload, "complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(golden, f"{store}/out", MANY)
    name = sorted(weights(listing("out")))[1]
    client().pipe_file(f"{BUCKET}/out/{name}", b"somebody's")
    convert(golden, f"{store}/out", MANY)
    convert(golden, tmp_path / "near", MANY)
    assert weights(listing("out")) == weights(local_files(tmp_path / "near"))


def test_another_checkpoint_is_not_mixed_in(store, golden):
    convert(golden, f"{store}/out", MANY)
    with pytest.raises(DestinationError, match="holds another"):
        convert(golden, f"{store}/out", ConvertOptions(dtype="bf16"))
    client().pipe_file(f"{BUCKET}/other/model-00001-of-00002.safetensors", b"somebody's")
    with pytest.raises(DestinationError, match="another checkpoint"):
        convert(golden, f"{store}/other", MANY)
    convert(golden, f"{store}/other", MANY, publish=PublishOptions(replace=True))
    assert "model-00001-of-00002.safetensors" not in listing("other")


def test_errors_name_the_place_and_the_way_out(store, golden, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="holds no files"):
        lingconv.inspect(f"{store}/nothing")
    with pytest.raises(UsageError, match="cannot be opened"):
        lingconv.inspect("nosuchscheme://bucket/x")
    with pytest.raises(UsageError, match="repositories"):
        convert(golden, f"{store}/x", MANY, publish=PublishOptions(create=True))
    with pytest.raises(UsageError, match="`part"):
        convert(golden, f"{store}/x", MANY, resources=Resources(part=lingconv.Part(1, 2)))
    upload(golden, "tiny")
    with pytest.raises(DestinationError, match="inside the source"):
        convert(f"{store}/tiny", f"{store}/tiny/fp8", MANY)
    with pytest.raises((PermissionDenied, CheckpointError, NetworkError), match="nobucket"):
        convert(golden, "s3://nobucket/x", MANY)


def test_a_source_that_changes_is_noticed(store, golden, tmp_path, monkeypatch):
    upload(golden, "tiny")
    cat = client().cat_file
    name = next(path.name for path in golden.glob("*.safetensors"))
    changed = []

    def changing(path, **words):
        data = cat(path, **words)
        if path.endswith(name) and not changed and words.get("start", 0) > 50_000:
            changed.append(path)
            body = bytearray(cat(path))
            body[-1] ^= 1
            client().pipe_file(path, bytes(body))
        return data

    monkeypatch.setattr(client(), "cat_file", changing)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        convert(f"{store}/tiny", tmp_path / "out", MANY)
    assert changed
    assert not (tmp_path / "out" / "config.json").exists()
