"""Reading from the Hub, as the real client and a server on localhost have it."""

import json
import shutil

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import httpx
from starlette.responses import JSONResponse

import lingconv
import lingconv.storage.byte_ranges as ranges
from lingconv import (
    CheckpointError,
    ConvertOptions,
    GgufOptions,
    NetworkError,
    PermissionDenied,
    Resources,
    UsageError,
    convert,
)
from lingconv.api import merge_checkpoints
from lingconv.plans.checkpoint_weights import mean
from lingconv.storage.hub import answers
from lingconv.storage.hub import files as remote
from lingconv.storage.hub.address import is_hub, parse_address
from tests.hub_server import TOKEN, Fire, Hub
from tests.hub_support import point_client_at, watched, weight_bytes
from tests.support import INDEX, edit_json, tree_digest
from tests.test_engine import StopAfter

FP8 = ConvertOptions(dtype="fp8", max_shard_bytes=300_000)
SHARD = "model-00002-of-00003.safetensors"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def hub(monkeypatch, tmp_path, golden):
    """A Hub that has the tiny model as org/tiny-ling-v2; ranges are small enough to be many."""
    monkeypatch.setattr(ranges, "SMALL_BYTES", 1000)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(ranges, "REQUEST_BYTES", 100_000)
    with Hub() as server:
        point_client_at(monkeypatch, server.endpoint, tmp_path / "home")
        server.add("org/tiny-ling-v2", contents(golden))
        yield server


def assert_same_weights(left, right):
    """Whether two targets are the same but for where they say that they come from."""

    def told(folder):
        own = ("run.json", "lingconv.json")
        return {k: v for k, v in tree_digest(folder).items() if not k.endswith(own)}

    assert told(left) == told(right)


def test_addresses():
    assert str(parse_address("hf://org/name@refs/pr/3/a.gguf")) == "hf://org/name@refs/pr/3/a.gguf"
    assert parse_address("https://huggingface.co/org/name/tree/main").repository == "org/name"
    assert not is_hub("org/name")
    for text in ("hf://name", "hf://datasets/org/name", "https://example.com/x"):
        with pytest.raises(UsageError) as caught:
            parse_address(text)
        assert "hf://org/name" in caught.value.hint


def test_inspect_reads_headers_only_and_names_the_commit(hub, golden):
    report = lingconv.inspect("hf://org/tiny-ling-v2")
    local = lingconv.inspect(golden)
    commit = hub.repositories["org/tiny-ling-v2"].refs["main"]
    assert report.source == f"hf://org/tiny-ling-v2@{commit}"
    assert (report.encodings, report.faults) == (local.encodings, local.faults)
    weights = sum(path.stat().st_size for path in golden.glob("*.safetensors"))
    assert sum(hub.bytes_out.values()) < weights / 20


def test_headers_of_many_shards_are_asked_for_together(hub, golden, tmp_path, monkeypatch):
    convert(golden, tmp_path / "many", ConvertOptions(max_shard_bytes=60_000))
    hub.add("org/many", contents(tmp_path / "many"))
    monkeypatch.setattr(remote, "TIMEOUT", httpx.Timeout(None))
    hub.together = 9
    assert lingconv.inspect("hf://org/many").shards > 20
    assert hub.together == 0


@pytest.mark.parametrize("kind", ["fp8", "gguf", "megatron", "bf16 in one file"])
@pytest.mark.parametrize("download", [False, True])
def test_conversions_from_the_hub_are_those_of_local_files(hub, golden, tmp_path, kind, download):
    options = {
        "fp8": FP8,
        "gguf": ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="q8_0")),
        "megatron": ConvertOptions(layout="megatron"),
        "bf16 in one file": ConvertOptions(),
    }[kind]
    name = "x.gguf" if kind == "gguf" else "x"
    convert(golden, tmp_path / "local" / name, options)
    resources = Resources(download=download)
    convert("hf://org/tiny-ling-v2", tmp_path / "far" / name, options, resources=resources)
    assert_same_weights(tmp_path / "local", tmp_path / "far")


def test_neighbours_are_fetched_together_ahead_of_the_work(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", httpx.Timeout(None))
    hub.together = 3
    convert("hf://org/tiny-ling-v2", tmp_path / "out", FP8)
    tensors = 86
    assert hub.requests["download"] < tensors + 40  # scales and norms come in blocks
    assert hub.together == 0


def test_no_byte_is_fetched_twice_by_a_copy(hub, golden, tmp_path):
    convert("hf://org/tiny-ling-v2", tmp_path / "out", ConvertOptions(max_shard_bytes=700_000))
    for path in golden.glob("*.safetensors"):
        data = path.read_bytes()
        digest = hub.keep(path.name, data)
        assert hub.bytes_out[digest] < 1.25 * len(data)  # blocks around what is small


def test_files_in_the_cache_are_not_fetched(hub, golden, tmp_path):
    HfApi().hf_hub_download("org/tiny-ling-v2", SHARD)
    digest = hub.keep(SHARD, (golden / SHARD).read_bytes())
    before = hub.bytes_out[digest]
    convert("hf://org/tiny-ling-v2", tmp_path / "far", FP8)
    convert(golden, tmp_path / "local", FP8)
    assert hub.bytes_out[digest] == before
    assert_same_weights(tmp_path / "local", tmp_path / "far")


def test_without_a_network_the_cache_has_to_do(hub, golden, tmp_path, monkeypatch):
    HfApi().snapshot_download("org/tiny-ling-v2")
    asked = sum(hub.requests.values())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert("hf://org/tiny-ling-v2", tmp_path / "far", FP8)
    convert(golden, tmp_path / "local", FP8)
    assert_same_weights(tmp_path / "local", tmp_path / "far")
    assert sum(hub.requests.values()) == asked
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE") as caught:
        lingconv.inspect("hf://org/other")
    assert caught.value.exit_code == 5


FIRE = {
    "429": 0.2,
    "503": 0.2,
    "cut": 0.2,
    "short": 0.2,
    "expired": 0.2,
    "store 503": 0.2,
    "etag": 0.2,
}


@pytest.mark.parametrize("kind", [*FIRE, "all"])
@pytest.mark.parametrize("download", [False, True])
def test_trouble_on_the_way_changes_no_byte(hub, golden, tmp_path, kind, download):
    shares = dict.fromkeys(FIRE, 0.05) if kind == "all" else {kind: FIRE[kind]}
    hub.fire = Fire(seed=3, **shares)
    if kind == "expired":
        hub.link_uses = 3
    resources = Resources(download=download)
    convert("hf://org/tiny-ling-v2", tmp_path / "far", FP8, resources=resources)
    hub.fire = Fire()
    convert(golden, tmp_path / "local", FP8)
    assert_same_weights(tmp_path / "local", tmp_path / "far")
    assert hub.leaks == []


def test_a_link_that_stalls_is_asked_again(hub, golden, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", httpx.Timeout(1.0))
    hub.fire = Fire(stall=0.05)
    convert("hf://org/tiny-ling-v2", tmp_path / "far", FP8)
    assert hub.fire.met["stall"]
    convert(golden, tmp_path / "local", FP8)
    assert_same_weights(tmp_path / "local", tmp_path / "far")


def test_what_was_fetched_whole_is_checked(hub, golden, tmp_path):
    hub.fire = Fire(corrupt=0.5)
    # What has no room is read by ranges, which have no checksums: here all files have.
    resources = Resources(download=True, max_disk_bytes=10_000_000)
    convert("hf://org/tiny-ling-v2", tmp_path / "far", FP8, resources=resources)
    assert hub.fire.met["corrupt"]
    convert(golden, tmp_path / "local", FP8)
    assert_same_weights(tmp_path / "local", tmp_path / "far")


@pytest.mark.parametrize("room", [0, 1_000_000, 1_800_000])
def test_whole_files_are_fetched_within_bounds_and_deleted(hub, golden, tmp_path, room):
    target = tmp_path / "far"
    sizes = sorted(path.stat().st_size for path in golden.glob("*.safetensors"))
    resources = Resources(download=True, max_disk_bytes=room)
    with watched(lambda: weight_bytes(target / ".lingconv")) as found:
        convert("hf://org/tiny-ling-v2", target, FP8, resources=resources)
    assert max(found) <= (room or 2 * sizes[-1])
    if room != 1_000_000:
        assert max(found) >= sizes[0]
    assert not list((target / ".lingconv").glob("fetched*"))
    convert(golden, tmp_path / "local", FP8)
    assert_same_weights(tmp_path / "local", target)


def test_a_server_that_stays_busy_is_given_up(hub, tmp_path):
    model = "hf://org/tiny-ling-v2"
    hub.fire = Fire(**{"store 503": 1.0})
    with pytest.raises(NetworkError, match="after 9 tries: the Hub answers 503") as caught:
        convert(model, tmp_path / "out", FP8)
    assert caught.value.exit_code == 5
    assert "same command" in caught.value.hint
    hub.fire = Fire()
    convert(model, tmp_path / "out", FP8)
    for download in (False, True):
        hub.fire = Fire(expired=1.0)
        with pytest.raises(NetworkError, match=r"after 9 tries|refused with 403"):
            convert(model, tmp_path / f"{download}", FP8, resources=Resources(download=download))
    hub.fire = Fire(etag=1.0)
    with pytest.raises(NetworkError, match="serves 000"):
        lingconv.inspect(model)


@pytest.mark.parametrize(
    ("how", "token", "error", "text"),
    [
        ({"private": True}, "", PermissionDenied, "private and not yours"),
        ({"private": True}, "hf_other", PermissionDenied, "private and not yours"),
        ({"gated": True}, "", PermissionDenied, "is gated"),
        ({"gated": True}, "hf_other", PermissionDenied, "is gated"),
    ],
)
def test_who_may_not_read_is_told_what_to_do(hub, golden, monkeypatch, how, token, error, text):
    hub.add("org/closed", contents(golden), **how)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=text) as caught:
        lingconv.inspect("hf://org/closed")
    assert caught.value.exit_code == 4
    assert "hf auth login" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert not lingconv.inspect("hf://org/closed").faults


def test_what_is_not_there(hub, tmp_path):
    with pytest.raises(PermissionDenied, match="org/nobody is not there"):
        lingconv.inspect("hf://org/nobody")
    with pytest.raises(UsageError, match="no such revision"):
        lingconv.inspect("hf://org/tiny-ling-v2@v9")
    with pytest.raises(CheckpointError, match="holds no files"):
        lingconv.inspect("hf://org/tiny-ling-v2/folder")
    with pytest.raises(UsageError) as caught:
        lingconv.inspect("org/tiny-ling-v2")
    assert caught.value.hint == "for the Hub, write `hf://org/tiny-ling-v2`"


def test_a_listing_that_lies_about_a_size(hub, tmp_path):
    hub.lies[SHARD] = 4096
    with pytest.raises(CheckpointError, match=rf"{SHARD} has 1,779,656 bytes, its listing says"):
        lingconv.inspect("hf://org/tiny-ling-v2")
    hub.lies = {"config.json": -7}
    with pytest.raises(CheckpointError, match=r"config.json has .* bytes, its listing says"):
        lingconv.inspect("hf://org/tiny-ling-v2")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil"])
def test_a_listing_that_leads_out_of_the_repository(hub, tmp_path, name):
    hub.bad_names = [name]
    with pytest.raises(CheckpointError, match="leads out of it"):
        convert("hf://org/tiny-ling-v2", tmp_path / "out", FP8)
    assert not (tmp_path / "out").exists()


def odd_hub(monkeypatch, answer):
    """Let the Hub answer each listing with `answer`, a function of the entries that are right."""
    right = Hub.list_tree

    async def list_tree(self, request, repository, repo, rev):
        listed = await right(self, request, repository, repo, rev)
        return answer(self, request, json.loads(listed.body))

    routes = [
        (methods, path, list_tree if action is right else action)
        for methods, path, action in Hub.ROUTES
    ]
    monkeypatch.setattr(Hub, "ROUTES", routes)
    monkeypatch.setattr(Hub, "list_tree", list_tree)


def test_a_listing_without_end(hub, monkeypatch):
    def same_page(server, request, entries):
        link = f'<{server.endpoint}{request.url.path}?recursive=True>; rel="next"'
        return JSONResponse([], headers={"Link": link})

    odd_hub(monkeypatch, same_page)
    monkeypatch.setattr(answers, "MAX_PAGES", 20)
    with pytest.raises(CheckpointError, match="more than 20 pages"):
        lingconv.inspect("hf://org/tiny-ling-v2")
    assert hub.requests["list_tree"] == 20


@pytest.mark.parametrize(
    "listed",
    [
        [5],
        {"files": 5},
        [{"type": "file", "path": 5, "size": 5, "oid": "x"}],
        [{"type": "file", "path": "x", "size": -5, "oid": "x"}],
        [{"type": "file", "path": "x", "size": True, "oid": "x"}],
        [{"type": "file", "path": "x", "size": 5}],
        [{"type": "file", "path": "x", "size": 5, "oid": "x"}] * 2,
    ],
)
def test_a_listing_that_is_none(hub, monkeypatch, listed):
    odd_hub(monkeypatch, lambda *_: JSONResponse(listed))
    with pytest.raises(CheckpointError, match=r"listed|list of files") as caught:
        lingconv.inspect("hf://org/tiny-ling-v2")
    assert "answers as no Hub does" in caught.value.hint


def test_ten_thousand_files(hub, golden, tmp_path):
    files = {f"notes/{number:05d}.txt": b"n%d" % number for number in range(10_000)}
    hub.add("org/large", {**contents(golden), **files})
    report = lingconv.inspect("hf://org/large")
    assert not [fault for fault in report.faults if fault.fatal]
    assert sum(name.startswith("notes/") for name in report.side_files) == 10_000


def test_what_moves_upstream_does_not_matter_to_a_run_that_goes_on(hub, golden, tmp_path):
    model, target = "hf://org/tiny-ling-v2", tmp_path / "out"
    with pytest.raises(lingconv.Interrupted):
        convert(model, target, FP8, progress=StopAfter(3), resources=Resources(jobs=1))
    repository = hub.repositories["org/tiny-ling-v2"]
    old = repository.refs["main"]
    renamed = {f"moved/{name}": digest for name, digest in repository.commits[old].items()}
    repository.commit("main", renamed, "everything is somewhere else now")
    result = convert(model, target, FP8)
    assert result.files_found_finished == 3
    convert(golden, tmp_path / "local", FP8)
    assert_same_weights(tmp_path / "local", target)
    assert json.loads((target / "lingconv.json").read_text())["revision"] == f"commit {old}"
    with pytest.raises(CheckpointError):
        convert(model, target, FP8, fresh=True)  # which reads what main is now


def test_a_commit_that_is_gone(hub, tmp_path):
    model, target = "hf://org/tiny-ling-v2", tmp_path / "out"
    with pytest.raises(lingconv.Interrupted):
        convert(model, target, FP8, progress=StopAfter(3), resources=Resources(jobs=1))
    repository = hub.repositories["org/tiny-ling-v2"]
    del repository.commits[repository.refs["main"]]
    with pytest.raises(UsageError, match="no such revision"):
        convert(model, target, FP8)


def test_gguf_on_the_hub(hub, golden, tmp_path):
    q8 = ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="q8_0"))
    convert(golden, tmp_path / "x-Q8_0.gguf", q8)
    hub.add("org/gguf", {"sub/x-Q8_0.gguf": (tmp_path / "x-Q8_0.gguf").read_bytes()})
    bf16 = ConvertOptions(dtype="bf16")
    convert("hf://org/gguf/sub/x-Q8_0.gguf", tmp_path / "far", bf16)
    convert(tmp_path / "x-Q8_0.gguf", tmp_path / "local", bf16)
    assert_same_weights(tmp_path / "local", tmp_path / "far")


def test_checkpoints_on_the_hub_and_here_are_averaged(hub, golden, golden_channel, tmp_path):
    hub.add("org/fp8", contents(golden_channel))
    bf16 = ConvertOptions(dtype="bf16")
    sources = ["hf://org/tiny-ling-v2", "hf://org/fp8"]
    merge_checkpoints(sources, tmp_path / "far", mean(2), bf16)
    merge_checkpoints([golden, golden_channel], tmp_path / "local", mean(2), bf16)
    for path in (tmp_path / "local").glob("*.safetensors*"):
        assert path.read_bytes() == (tmp_path / "far" / path.name).read_bytes()
    card = (tmp_path / "far/README.md").read_text()
    assert "- org/tiny-ling-v2\n- org/fp8" in card
    assert hub.repositories["org/fp8"].refs["main"] in card


def test_proofs_read_both_sides_from_the_hub(hub, golden, golden_block, tmp_path):
    hub.add("org/fp8", contents(golden_block))
    verdict = lingconv.verify("hf://org/tiny-ling-v2", "hf://org/fp8")
    assert verdict.ok
    assert verdict.forward is not None
    assert not lingconv.diff("hf://org/tiny-ling-v2", golden).differences


def test_a_shard_that_is_missing_upstream(hub, golden, tmp_path):
    broken = shutil.copytree(golden, tmp_path / "broken")
    (broken / SHARD).unlink()
    edit_json(broken / INDEX, lambda index: None)
    hub.add("org/broken", contents(broken))
    with pytest.raises(CheckpointError) as caught:
        convert("hf://org/broken", tmp_path / "out", FP8)
    assert any(SHARD in str(fault) for fault in caught.value.faults)
