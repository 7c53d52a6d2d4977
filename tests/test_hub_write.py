"""Writing to the Hub: straight from a conversion, and a folder that is finished."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load as load_safetensors
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import lingconv
import lingconv.storage.hub.repository
from lingconv import (
    CheckpointError,
    ConvertOptions,
    DestinationError,
    Fp8Options,
    GgufOptions,
    NetworkError,
    PermissionDenied,
    PublishOptions,
    ResourceError,
    Resources,
    UsageError,
    convert,
)
from lingconv.api import write_report
from lingconv.storage.file_names import MARK
from lingconv.storage.hub.repository import Repository
from lingconv.storage.local import LocalStorage
from tests.hub_killer import MAX_DISK, kill_under_fire
from tests.hub_server import TOKEN, Fire, Hub
from tests.hub_support import HURRIED, environment, watched, weight_bytes
from tests.kit import command, start, start_command
from tests.kit.children import lingconv_main
from tests.support import assert_same_model, edit_json, tree_digest
from tests.test_engine import StopAfter
from tests.test_hub_read import contents, hub

__all__ = ["hub"]  # the fixture

# huggingface_hub sends bodies in a way that its own HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FP8 = ConvertOptions(dtype="fp8", max_shard_bytes=300_000)
CREATE = PublishOptions(create=True)
COMPLETE = {"model.safetensors.index.json", "config.json", "lingconv.json", "README.md"}


def assert_published(hub, name, local, revision="main", ignore=()):
    """Whether a repository holds the files of a local target; its card apart."""
    own = {"lingconv.json", "README.md", *ignore}
    found = {k: v for k, v in hub.tree(name, revision).items() if k not in own}
    wanted = {
        path.relative_to(local).as_posix(): path.read_bytes()
        for path in Path(local).rglob("*")
        if path.is_file() and ".lingconv" not in path.parts
    }
    assert found == {k: v for k, v in wanted.items() if k not in own}


class Sent(StopAfter):
    """Raises once the Hub has some files."""

    def file_ends(self, name, nbytes, seconds):
        pass

    def file_sent(self, name, nbytes, seconds):
        super().file_ends(name, nbytes, seconds)


def test_a_conversion_goes_straight_to_a_repository(hub, golden, tmp_path):
    result = convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local")
    repository = hub.repositories["org/out"]
    assert repository.private
    ref, head, _, last = repository.log[-1]
    assert ref == "main"
    assert set(last) >= COMPLETE
    assert not any(set(added) & COMPLETE for *_, added in repository.log[:-1])
    assert result.destination == f"hf://org/out@{head}"
    assert result.commit_url == f"{hub.endpoint}/org/out/commit/{head}"
    assert set(hub.stored.values()) == {1}
    assert hub.leaks == []


def test_the_same_command_has_nothing_to_do(hub):
    first = convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    commits = len(hub.repositories["org/out"].log)
    again = convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    assert (again.files_written, again.files_found_finished) == (0, first.files_written)
    assert again.destination == first.destination
    assert len(hub.repositories["org/out"].log) == commits


def test_what_others_read_of_it(hub, golden, tmp_path):
    convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    folder = Path(HfApi().snapshot_download("org/out", local_dir=tmp_path / "down"))
    convert(golden, tmp_path / "local", FP8)
    assert_same_model(folder, tmp_path / "local")
    for data in hub.tree("org/out").items():
        if data[0].endswith(".safetensors"):
            assert load_safetensors(data[1])
    assert lingconv.verify(golden, "hf://org/out").ok


@pytest.mark.parametrize("room", [0, 310_000, 650_000])
def test_disk_stays_within_bounds(hub, tmp_path, room, golden):
    staging = tmp_path / "staging"
    resources = Resources(max_disk_bytes=room, staging=staging)
    with watched(lambda: weight_bytes(staging)) as found:
        convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE, resources=resources)
    assert 0 < max(found) <= (room or 2 * 303_976)
    assert found[-1] == 0
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local")


def test_both_ways_through_a_small_disk(hub, tmp_path, golden):
    """Whole files come and go while others are written and sent: all within one bound."""
    staging = tmp_path / "staging"
    room = 3_700_000
    resources = Resources(max_disk_bytes=room, staging=staging, download=True)
    with watched(lambda: weight_bytes(staging)) as found:
        convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE, resources=resources)
    assert 1_700_000 < max(found) <= room
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local")


def test_a_disk_that_is_too_small_is_said_before_anything_happens(hub):
    resources = Resources(max_disk_bytes=200_000)
    with pytest.raises(ResourceError, match="the largest file has 303,976 bytes") as caught:
        convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE, resources=resources)
    assert "`max_shard_bytes`" in caught.value.hint
    assert "org/out" not in hub.repositories


def test_sending_and_writing_overlap(hub, golden):
    """While a file is on its way the next ones are written."""
    events = []

    class Order(Sent):
        def file_begins(self, name, nbytes, held):
            events.append("begins")
            if events.count("begins") == 2:
                hub.held = False

        def file_sent(self, name, nbytes, seconds):
            events.append("sent")

    hub.held = True  # nothing is sent before the second file is begun
    resources = Resources(max_disk_bytes=650_000)  # and no third one has room before
    convert(golden, "hf://org/out", FP8, publish=CREATE, progress=Order(0), resources=resources)
    assert events[:2] == ["begins", "begins"]
    assert "begins" in events[events.index("sent") :]


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.long)])
def test_kills_under_fire(golden, tmp_path, rounds):
    with Hub() as hub:
        seen = kill_under_fire(hub, golden, tmp_path, rounds)
    assert 0 < seen.disk <= MAX_DISK
    assert seen.peak <= seen.quiet_peak + (32 << 20)
    state = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in state if TOKEN.encode() in path.read_bytes()] == []
    assert hub.leaks == []
    kinds = ("429", "503", "cut", "short", "expired", "etag", "upload cut", "commit lost")
    assert [kind for kind in kinds if not hub.fire.met[kind]] == []


def test_an_interrupted_run_goes_on_and_sends_nothing_twice(hub, golden, tmp_path):
    arguments = ("hf://org/tiny-ling-v2", "hf://org/out", FP8)
    for _ in range(2):
        with pytest.raises(lingconv.Interrupted):
            convert(*arguments, publish=CREATE, progress=Sent(3))
    convert(*arguments, publish=CREATE)
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local")
    assert set(hub.stored.values()) == {1}


def test_from_another_machine_nothing_that_is_there_is_sent_again(hub, golden, tmp_path):
    arguments = ("hf://org/tiny-ling-v2", "hf://org/out", FP8)
    with pytest.raises(lingconv.Interrupted):
        convert(*arguments, publish=CREATE, progress=Sent(5))
    convert(*arguments, publish=CREATE, resources=Resources(staging=tmp_path / "elsewhere"))
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local")
    assert set(hub.stored.values()) == {1}


@pytest.mark.parametrize(
    "kind", ["upload cut", "upload 503", "upload expired", "commit fails", "commit lost"]
)
def test_trouble_with_sending(hub, golden, tmp_path, kind):
    hub.fire = Fire(seed=5, **{kind: 0.1 if kind == "upload expired" else 0.3})
    hub.part_bytes = 100_000
    convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    assert hub.fire.met[kind]
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local")
    added = [name for *_, names in hub.repositories["org/out"].log for name in names]
    assert len(added) == len(set(added)), "a commit was made twice"


def test_a_hub_that_stays_broken(hub):
    hub.fire = Fire(**{"commit fails": 1.0})
    with pytest.raises(NetworkError, match="after 9 tries: the Hub answers 500") as caught:
        convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    assert "same command" in caught.value.hint
    hub.fire = Fire()
    convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    assert set(hub.stored.values()) == {1}


def test_somebody_else_commits_in_between(hub, golden, tmp_path):
    def intrude(repository, ref):
        hub.on_commit = None
        files = {**repository.files(ref)[1], **hub.put({"NOTES.md": b"by hand"})}
        repository.commit(ref, files, "notes", ["NOTES.md"])

    hub.on_commit = intrude
    convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    assert hub.tree("org/out")["NOTES.md"] == b"by hand"
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local", ignore=["NOTES.md"])


@pytest.mark.parametrize("number", [1, 14])  # both are not in the first commit
def test_somebody_else_writes_the_same_files(hub, number):
    name = f"model-{number:05}-of-00014.safetensors"

    def intrude(repository, ref):
        files = {**repository.files(ref)[1], **hub.put({name: b"another"})}
        repository.commit(ref, files, "mine", [name])

    hub.on_commit = intrude
    with pytest.raises(DestinationError, match="somebody else changed") as caught:
        convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    assert caught.value.exit_code == 7
    assert caught.value.details == (name,)


def test_somebody_else_commits_without_end(hub, monkeypatch):
    def intrude(repository, ref):
        hub.intrusions += 1
        files = {**repository.files(ref)[1], **hub.put({"NOTES.md": b"%d" % hub.intrusions})}
        repository.commit(ref, files, "notes", ["NOTES.md"])

    monkeypatch.setattr(lingconv.storage.hub.repository, "MOVES", 5)
    hub.intrusions, hub.on_commit = 0, intrude
    with pytest.raises(NetworkError, match="412"):
        convert("hf://org/tiny-ling-v2", "hf://org/out", FP8, publish=CREATE)
    assert hub.intrusions == 6


def test_branches_and_pull_requests(hub, golden, tmp_path):
    hub.add("org/out", {"README.md": b"# mine"})
    convert(golden, tmp_path / "local", FP8)
    convert(golden, "hf://org/out@fp8", FP8)
    assert_published(hub, "org/out", tmp_path / "local", "fp8")
    assert hub.tree("org/out", "fp8")["README.md"] == b"# mine"  # somebody's own card stays
    assert set(hub.tree("org/out")) == {"README.md"}
    request = PublishOptions(pull_request=True)
    with pytest.raises(lingconv.Interrupted):
        convert(golden, "hf://org/out", FP8, publish=request, progress=Sent(2))
    result = convert(golden, "hf://org/out", FP8, publish=request)
    assert hub.repositories["org/out"].pulls == 1
    assert_published(hub, "org/out", tmp_path / "local", "refs/pr/1")
    assert set(hub.tree("org/out")) == {"README.md"}
    assert result.destination.startswith("hf://org/out@")


def test_another_checkpoint_is_not_mixed_with(hub, golden, tmp_path):
    convert(golden, tmp_path / "bf16", ConvertOptions(max_shard_bytes=500_000))
    hub.add("org/out", {**contents(golden), "model-00009-of-00009.safetensors": b"old"})
    with pytest.raises(DestinationError, match="holds another checkpoint") as caught:
        convert(golden, "hf://org/out", FP8)
    assert "config.json" in caught.value.details
    assert "`replace`" in caught.value.hint
    convert(golden, "hf://org/out", FP8, publish=PublishOptions(replace=True))
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local")
    with pytest.raises(DestinationError, match="holds another conversion"):
        convert(golden, "hf://org/out", ConvertOptions(dtype="f32"))


def test_who_may_not_write_is_told_so_at_once(hub, golden, monkeypatch):
    with pytest.raises(PermissionDenied, match="org/new is not there") as caught:
        convert(golden, "hf://org/new", FP8)
    assert "or `create` it" in caught.value.hint
    hub.add("org/open", {"README.md": b"x"})
    for token in ("", "hf_reader"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PermissionDenied) as caught:
            convert(golden, "hf://org/open", FP8)
        assert caught.value.exit_code == 4
        assert "hf auth login" in caught.value.hint
    assert hub.stored == {}
    for options, text in [
        (PublishOptions(public=True), "add `create`"),
        (PublishOptions(create=True, pull_request=True, replace=True), "`replace` is for a branch"),
    ]:
        with pytest.raises(UsageError, match=text):
            convert(golden, "hf://org/open", FP8, publish=options)
    with pytest.raises(UsageError, match="for repositories"):
        convert(golden, "local", FP8, publish=CREATE)
    with pytest.raises(UsageError, match="only whole repositories"):
        convert(golden, "hf://org/open/folder", FP8)


LICENCE = "license: our-own-licence"
REFUSAL = '"license" must be one of [apache-2.0, mit, ...]'


@pytest.mark.parametrize("target", ["hf://org/out", "hf://org/out/x.gguf"])
def test_a_card_that_the_hub_refuses_is_said_before_a_byte_is_sent(hub, golden, tmp_path, target):
    """As https://github.com/huggingface/huggingface_hub/issues/1927 has it."""
    source = tmp_path / "source"
    shutil.copytree(golden, source)
    (source / "README.md").write_text(f"---\n{LICENCE}\n---\n# tuned\n")
    hub.card_faults = {LICENCE: f"{REFUSAL} {TOKEN}"}
    options = ConvertOptions(layout="gguf" if target.endswith("gguf") else "hf")
    with pytest.raises(CheckpointError, match=r"refuses the front matter of README\.md") as caught:
        convert(source, target, options, publish=CREATE)
    assert caught.value.exit_code == 3
    assert caught.value.details == (f"{REFUSAL} ***",)
    assert (hub.stored, hub.requests["make_commit"]) == ({}, 0)
    assert hub.requests["validate"] == 1  # it is no passing trouble
    assert "with `fresh`" in caught.value.hint
    (source / "README.md").write_text("---\nlicense: mit\n---\n# tuned\n")
    convert(source, target, options, publish=CREATE, fresh=True)


def test_push_asks_for_the_card_before_a_byte_is_sent(hub, golden, folder, tmp_path):
    hub.card_faults = {"base_model: /data": "base_model is no repository", LICENCE: REFUSAL}
    plain = tmp_path / "plain"
    shutil.copytree(golden, plain)
    for source, card in ((folder, LICENCE), (plain, "base_model: /data/ckpts/iter_0001200")):
        (source / "README.md").write_text(f"---\n{card}\n---\n# tuned\n")
        with pytest.raises(CheckpointError, match="refuses the front matter"):
            lingconv.push(source, "hf://org/out", CREATE)
    assert (hub.stored, hub.requests["make_commit"]) == ({}, 0)
    hub.card_faults = {}
    lingconv.push(folder, "hf://org/out")


@pytest.mark.parametrize("ignored", ["config.json", ".safetensors"])
def test_what_a_gitignore_leaves_out_is_said_before_a_byte_is_sent(hub, golden, folder, ignored):
    """The client itself drops such files without a word: `_should_ignore` of its operations."""
    hub.ignored = [ignored]
    for send in (
        lambda: convert(golden, "hf://org/out", FP8, publish=CREATE),
        lambda: lingconv.push(folder, "hf://org/pushed", CREATE),
    ):
        with pytest.raises(DestinationError, match="gitignore leaves out files") as caught:
            send()
        assert all(name.endswith(ignored) for name in caught.value.details)
    assert (hub.stored, hub.requests["make_commit"]) == ({}, 0)


def test_push_leaves_a_card_of_somebody_else(hub, folder):
    (folder / "README.md").write_text("# the source's\n")
    hub.add("org/out", {"README.md": b"# mine"})
    lingconv.push(folder, "hf://org/out")
    assert hub.tree("org/out")["README.md"] == b"# mine"


@pytest.mark.parametrize("layout", ["hf", "hf-merged", "gguf", "megatron", "megatron-ranks"])
def test_what_was_sent_is_read_back_before_the_last_commit(hub, golden, monkeypatch, layout):
    """Damage of a file between its last byte on disk and its sending, which digests agree with."""
    target = "hf://org/out/x.gguf" if layout == "gguf" else "hf://org/out"
    options = ConvertOptions(layout=layout)
    add = Repository.add_weights

    def damaged(repository, files, before, total):
        for path in files.values():
            data = bytearray(path.read_bytes())
            data[:64] = bytes(64)
            path.write_bytes(data)
        return add(repository, files, before, total)

    with monkeypatch.context() as patch:
        patch.setattr(Repository, "add_weights", damaged)
        with pytest.raises(CheckpointError) as caught:
            convert(golden, target, options, publish=CREATE)
    assert "org/out" in f"{caught.value} {caught.value.details}"
    assert "config.json" not in hub.tree("org/out")
    again = convert(golden, target, options, publish=PublishOptions(), recheck=True)
    assert again.files_differing == again.files_written > 0
    assert lingconv.verify(golden, target).ok


def test_files_of_another_size_are_no_checkpoint(hub, golden, monkeypatch):
    """Bytes behind the end: a header says nothing of them."""
    add = Repository.add_weights

    def longer(repository, files, before, total):
        for path in files.values():
            path.write_bytes(path.read_bytes() + b"x")
        return add(repository, files, before, total)

    monkeypatch.setattr(Repository, "add_weights", longer)
    with pytest.raises(CheckpointError, match="does not hold the plan's files") as caught:
        convert(golden, "hf://org/out", FP8, publish=CREATE)
    assert len(caught.value.details) == 14
    assert "config.json" not in hub.tree("org/out")


def test_a_recheck_compares_the_digests_that_are_listed(hub, golden, tmp_path):
    """Every file is made again; what the Hub lists with the same digest is not sent again."""
    first = convert(golden, "hf://org/out", FP8, publish=CREATE)
    commits = len(hub.repositories["org/out"].log)
    again = convert(golden, "hf://org/out", FP8, recheck=True)
    assert (again.files_written, again.files_differing) == (first.files_written, 0)
    assert len(hub.repositories["org/out"].log) == commits
    assert set(hub.stored.values()) == {1}
    convert(golden, tmp_path / "local", FP8)
    assert_published(hub, "org/out", tmp_path / "local")


def test_rechecks_that_cannot_be_are_refused_by_name(golden):
    for target, resources in (
        ("s3://bucket/x", Resources()),
        ("hf://org/out", Resources(executor="ray")),
    ):
        with pytest.raises(UsageError, match="`recheck`"):
            convert(golden, target, FP8, resources=resources, recheck=True)


def test_gguf_files_stand_side_by_side(hub, golden, tmp_path):
    for outtype in ("q8_0", "q4_k_m"):
        options = ConvertOptions(layout="gguf", gguf=GgufOptions(outtype=outtype))
        name = f"tiny-{outtype.upper()}.gguf"
        convert("hf://org/tiny-ling-v2", f"hf://org/gguf/{name}", options, publish=CREATE)
        convert("hf://org/tiny-ling-v2", tmp_path / name, options)
        assert hub.tree("org/gguf")[name] == (tmp_path / name).read_bytes()
    card = ModelCard(hub.tree("org/gguf")["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == "org/tiny-ling-v2"
    assert data["base_model_relation"] == "quantized"
    assert "gguf" in data["tags"]
    assert "library_name" not in data
    assert "llama-server --hf-repo org/gguf --hf-file tiny-Q4_K_M.gguf" in card.text
    assert "vllm" not in card.text


# -- push


@pytest.fixture
def folder(golden, tmp_path, hub):
    """A finished FP8 target, with a card of its source."""
    source = dict(contents(golden))
    source["README.md"] = b"---\nlicense: mit\ntags: [ling]\n---\n# Ling\n\nIts own words.\n"
    hub.add("org/described", source)
    convert("hf://org/described", tmp_path / "fp8", FP8)
    return tmp_path / "fp8"


def test_push(hub, folder):
    pushed = lingconv.push(folder, "hf://org/out", CREATE)
    assert_published(hub, "org/out", folder)
    repository = hub.repositories["org/out"]
    assert repository.private
    assert set(repository.log[-1][3]) >= COMPLETE
    assert not any(set(added) & COMPLETE for *_, added in repository.log[:-1])
    assert (pushed.files_sent, pushed.files_found) == (14, 0)
    again = lingconv.push(folder, "hf://org/out")
    assert (again.files_sent, again.files_found) == (0, 14)
    assert set(hub.stored.values()) == {1}
    lingconv.push(folder, "hf://org/public", PublishOptions(create=True, public=True))
    assert not hub.repositories["org/public"].private


@pytest.mark.parametrize("layout", ["megatron", "megatron-ranks", "gguf"])
def test_push_sends_every_file_of_every_format(hub, golden, tmp_path, layout):
    target = tmp_path / ("x/tiny.gguf" if layout == "gguf" else "x")
    convert(golden, target, ConvertOptions(layout=layout))
    lingconv.push(tmp_path / "x", "hf://org/out", CREATE)
    assert_published(hub, "org/out", tmp_path / "x")
    down = Path(HfApi().snapshot_download("org/out", local_dir=tmp_path / "down"))
    if layout == "megatron":  # torch's own reader finds all of it
        dcp_to_torch_save(down / "iter_0000001", tmp_path / "whole.pt")
        whole = torch.load(tmp_path / "whole.pt", weights_only=False)
        assert len(whole) >= 39
        assert hub.repositories["org/out"].log[-1][3].count("iter_0000001/.metadata") == 1
    assert lingconv.verify(golden, down).ok


def test_push_refuses_what_would_not_be_read(hub, golden, tmp_path, monkeypatch):
    """A file that is read and not listed: the fault of which a hidden `.metadata` was one."""
    convert(golden, tmp_path / "x", ConvertOptions())
    listed = LocalStorage.files

    def short(self):
        found = listed(LocalStorage(tmp_path / "x"))
        return {k: v for k, v in found.items() if not k.endswith(".safetensors")}

    monkeypatch.setattr("lingconv.storage.overlay.Overlay.files", short)
    with pytest.raises(lingconv.CheckpointError):
        lingconv.push(tmp_path / "x", "hf://org/out", CREATE)
    assert "org/out" not in hub.repositories


def test_push_goes_on_after_trouble(hub, folder, monkeypatch):
    monkeypatch.setattr("lingconv.execution.publishing.push._BATCH_FILES", 3)
    with pytest.raises(lingconv.Interrupted):
        lingconv.push(folder, "hf://org/out", CREATE, progress=Sent(7))
    hub.fire = Fire(seed=2, **{"upload cut": 0.2, "commit lost": 0.2, "503": 0.1})
    lingconv.push(folder, "hf://org/out", CREATE)
    assert_published(hub, "org/out", folder)
    assert set(hub.stored.values()) == {1}


def test_paths_of_this_machine_are_not_published(hub, golden, tmp_path):
    convert(golden, tmp_path / "first", ConvertOptions(dtype="f32"))
    convert(tmp_path / "first", tmp_path / "second", FP8)
    lingconv.push(tmp_path / "second", "hf://org/pushed", CREATE)
    convert(tmp_path / "first", "hf://org/out", FP8, publish=CREATE)
    for name in ("org/pushed", "org/out"):
        small = {k: v for k, v in hub.tree(name).items() if not k.endswith(".safetensors")}
        assert not [name for name, data in small.items() if str(tmp_path).encode() in data]
        record = json.loads(small["lingconv.json"])
        assert record["source"] == "first"
        assert record["source_record"]["source"] == "tiny-ling-v2"


def test_files_that_the_hub_would_refuse_are_refused_before(hub, golden, folder, monkeypatch):
    monkeypatch.setattr("lingconv.storage.hub.repository.LARGEST_FILE_BYTES", 303_000)
    with pytest.raises(UsageError, match="the Hub takes files of 303,000") as caught:
        convert(golden, "hf://org/out", FP8, publish=CREATE)
    assert "`max_shard_bytes=50GB`" in caught.value.hint
    with pytest.raises(UsageError, match="model-00005-of-00014"):
        lingconv.push(folder, "hf://org/out", CREATE)
    assert "org/out" not in hub.repositories


def test_a_card_with_numbers(hub, folder, tmp_path):
    verdict = lingconv.verify("hf://org/described", folder)
    (tmp_path / "verdict.json").write_text(json.dumps(verdict.to_json()))
    write_report(verdict, tmp_path / "report.html")
    lingconv.push(
        folder, "hf://org/out", CREATE,
        verdict=tmp_path / "verdict.json", report=tmp_path / "report.html",
    )  # fmt: skip
    files = hub.tree("org/out")
    assert files["lingconv-verify.html"] == (tmp_path / "report.html").read_bytes()
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert data["tags"] == ["ling", "fp8", "lingconv"]
    assert data["base_model"] == "org/described"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers"
    row = next(line for line in card.text.splitlines() if line.startswith("| bf16 -> fp8"))
    worst = max(t.rel_error for t in verdict.tensors)
    assert f"{worst:.3g}" in row
    assert f"{verdict.forward.logits.mean_kld:.6g}" in card.text
    assert hub.repositories["org/described"].refs["main"] in card.text
    assert "## How to load" not in card.text  # nothing in the folder says what code loads it
    assert card.text.count("Its own words.") == 1
    assert card.text.index(MARK) < card.text.index("Its own words.")
    (folder / "README.md").write_bytes(files["README.md"])
    lingconv.push(folder, "hf://org/out")
    again = hub.tree("org/out")["README.md"].decode()
    assert again.count(MARK) == 1
    assert again.count("Its own words.") == 1


CODE = {"AutoModelForCausalLM": "modeling.BailingMoeV2ForCausalLM"}
FP8_CT = Fp8Options(dialect="compressed-tensors")


@pytest.mark.parametrize(
    ("options", "lines", "absent"),
    [
        (
            ConvertOptions(mtp="drop"),
            ["vllm serve org/out --trust-remote-code --tensor-parallel-size 4\n", "transformers<5"],
            ["quantized", "MTP"],
        ),
        (  # vLLM 0.33 stops at MTP layers; experts of 128 rows are one block
            ConvertOptions(dtype="fp8"),
            ["--model-path org/out --trust-remote-code\n", "vLLM: not with MTP layers"],
            ["vllm serve", "AutoModelForCausalLM", "--tp-size"],
        ),
        (
            ConvertOptions(dtype="fp8", mtp="drop", fp8=FP8_CT),
            ["vllm serve org/out --trust-remote-code\n", "dialect compressed-tensors"],
            ["--tensor-parallel-size", "scales f32"],
        ),
        (
            ConvertOptions(dtype="nvfp4", mtp="drop"),
            ["vllm serve org/out", "- nvfp4", "weights only"],
            ["- fp8"],
        ),
        (ConvertOptions(layout="megatron"), ["--ckpt-format torch_dist", "qk-layernorm"], ["vllm"]),
        (ConvertOptions(layout="hf-merged"), [], ["vllm", "## How to load"]),
    ],
)
def test_cards_claim_what_is_true_of_a_layout(hub, golden, tmp_path, options, lines, absent):
    source = dict(contents(golden))
    config = json.loads(source["config.json"])
    source["config.json"] = json.dumps({**config, "auto_map": CODE}).encode()
    hub.add("org/with-code", source)
    convert("hf://org/with-code", tmp_path / "x", options)
    lingconv.push(tmp_path / "x", "hf://org/out", CREATE)
    card = hub.tree("org/out")["README.md"].decode()
    assert all(line in card for line in lines), card
    assert not any(line in card for line in absent), card
    assert "what follows is the source's own card" not in card  # it has none


def test_tags_of_the_base_that_are_not_true_of_this_one_go(hub, golden, tmp_path):
    source = dict(contents(golden))
    source["README.md"] = b"---\ntags: [ling, fp8, gguf, compressed-tensors, merge]\n---\n# Ling\n"
    hub.add("org/tagged", source)
    convert("hf://org/tagged", "hf://org/out", ConvertOptions(dtype="f32"), publish=CREATE)
    assert ModelCard(hub.tree("org/out")["README.md"].decode()).data.tags == ["ling", "lingconv"]


def test_runtimes_that_need_code_are_named_where_the_config_names_it(hub, golden, tmp_path):
    convert(golden, tmp_path / "x", ConvertOptions(dtype="bf16"))
    lingconv.push(tmp_path / "x", "hf://org/out", CREATE)
    assert "## How to load" not in hub.tree("org/out")["README.md"].decode()
    edit_json(tmp_path / "x/config.json", lambda config: config.update(auto_map=CODE))
    lingconv.push(tmp_path / "x", "hf://org/out")
    assert 'AutoModelForCausalLM.from_pretrained(\n    "org/out"' in (
        hub.tree("org/out")["README.md"].decode()
    )


def test_what_is_not_finished_or_not_sound_is_not_pushed(hub, golden, tmp_path):
    with pytest.raises(lingconv.Interrupted):
        convert(golden, tmp_path / "half", FP8, progress=StopAfter(3), resources=Resources(jobs=1))
    with pytest.raises(DestinationError, match="is not finished"):
        lingconv.push(tmp_path / "half", "hf://org/out", CREATE)
    convert(golden, tmp_path / "x", FP8)
    (tmp_path / "x/model-00003-of-00014.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 faults") as caught:
        lingconv.push(tmp_path / "x", "hf://org/out", CREATE)
    assert "model-00003-of-00014" in caught.value.details[0]
    with pytest.raises(UsageError, match="is not a folder"):
        lingconv.push(tmp_path / "nothing", "hf://org/out", CREATE)
    with pytest.raises(UsageError, match="leave the path out"):
        lingconv.push(tmp_path / "x", "hf://org/out/sub", CREATE)
    assert "org/out" not in hub.repositories


def test_a_changed_model_replaces_another_only_when_asked(hub, golden, folder, tmp_path):
    lingconv.push(folder, "hf://org/out", CREATE)
    convert(golden, tmp_path / "bf16", ConvertOptions(max_shard_bytes=500_000))
    with pytest.raises(DestinationError, match="another checkpoint"):
        lingconv.push(tmp_path / "bf16", "hf://org/out")
    lingconv.push(tmp_path / "bf16", "hf://org/out", PublishOptions(replace=True))
    assert_published(hub, "org/out", tmp_path / "bf16")


# -- the command line, and what must not be said


def run_cli(hub, home, *words, token=TOKEN):
    return command(*words, environment=environment(hub.endpoint, home, token))


def test_the_command_line_and_its_events(hub, tmp_path):
    home = tmp_path / "home"
    source, target = "hf://org/tiny-ling-v2", "hf://org/out"
    words = [source, target, "--dtype", "fp8", "--max-shard-size", "300KB", "--create"]
    shown = run_cli(hub, home, "convert", *words, "-n")
    assert shown.exit_code == 0, shown.err
    assert "disk       607.95 kB needed" in shown.out
    done = run_cli(hub, home, "convert", *words, "--json")
    assert done.exit_code == 0, done.err
    value = json.loads(done.out)
    head = hub.repositories["org/out"].refs["main"]
    assert value["destination"] == f"hf://org/out@{head}"
    assert value["commit_url"].endswith(head)
    events = [json.loads(line) for line in done.err.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("file_sent") == kinds.count("file_ends") == 14
    assert kinds.index("sending") < kinds.index("file_sent")
    looked = run_cli(hub, home, "inspect", target)
    assert looked.exit_code == 0
    assert f"hf://org/out@{head}" in looked.out
    folder = tmp_path / "folder"
    assert run_cli(hub, home, "quantize", source, folder).exit_code == 0
    pushed = run_cli(hub, home, "push", folder, "hf://org/pushed", "--create")
    assert pushed.exit_code == 0, pushed.err
    assert pushed.out.splitlines()[1].startswith(f"{hub.endpoint}/org/pushed/commit/")
    assert "lingconv verify SRC hf://org/pushed@" in pushed.err
    proof = run_cli(hub, home, "verify", source, "hf://org/pushed", "--level", "tensors")
    assert proof.exit_code == 0, proof.err


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_does_not_wait_for_an_upload(hub, golden, tmp_path, asked):
    words = ["convert", golden, "hf://org/out", "--create", "--dtype", "fp8"]
    words += ["--staging", tmp_path / "staging"]
    home = tmp_path / "home"
    with hub.holding():
        process = start_command(*words, environment=environment(hub.endpoint, home))
        hub.until_waiting()
        process.send_signal(asked)
        ended = process.end()
    assert ended.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[asked]
    assert "same command" in ended.err
    assert run_cli(hub, home, *words).exit_code == 0
    convert(golden, tmp_path / "local", ConvertOptions(dtype="fp8"))
    assert_published(hub, "org/out", tmp_path / "local")


def hurried_command(words):
    """Run in a child. The real pauses would take minutes."""
    import huggingface_hub.utils._http

    import lingconv.storage.hub.client

    lingconv.storage.hub.client.FIRST_WAIT_S = 0.001
    huggingface_hub.utils._http.time = HURRIED
    lingconv_main(words)


def test_the_token_is_said_nowhere(hub, golden, tmp_path):
    home, staging = tmp_path / "home", tmp_path / "staging"
    source = "hf://org/tiny-ling-v2"
    told = []
    fire = {"upload 503": 0.2, "commit lost": 0.2, "503": 0.1, "cut": 0.1, "expired": 0.1}
    for share, token in [(fire, TOKEN), ({"commit fails": 1.0}, TOKEN), ({"503": 1.0}, TOKEN)]:
        hub.fire = Fire(seed=1, **{kind: min(1.0, part) for kind, part in share.items()})
        name = f"org/out{len(told)}"
        words = ["--dtype", "fp8", "--create", "--staging", staging, "-v"]
        own = environment(hub.endpoint, home, token)
        told.append(
            start(
                hurried_command,
                ["convert", source, f"hf://{name}", *map(str, words)],
                environment=own,
            ).end()
        )
    assert [done.exit_code for done in told] == [0, 5, 5], [done.err for done in told]
    hub.fire = Fire()
    said = "".join(done.out + done.err for done in told)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "journal.jsonl" for path in files)
    assert TOKEN not in said
    assert "Signature=" not in said
    assert "sig=" not in said
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert [name for name, data in hub.tree("org/out0").items() if TOKEN.encode() in data] == []
    assert hub.leaks == []


def test_proofs_come_into_the_card(hub, golden, tmp_path):
    home, source = tmp_path / "home", "hf://org/tiny-ling-v2"
    done = run_cli(
        hub, home, "quantize", source, "hf://org/out", "--create", "--pr", "--verify"
    )  # fmt: skip
    assert done.exit_code == 0, done.err
    card = hub.tree("org/out", "refs/pr/1")["README.md"].decode()
    assert "`lingconv verify --level forward` against the source: passed." in card
    assert "| Mean KLD |" in card
    assert run_cli(hub, home, "quantize", source, tmp_path / "x", "--verify").exit_code == 0
    assert run_cli(hub, home, "push", tmp_path / "x", "hf://org/x", "--create").exit_code == 0
    assert "| Mean KLD |" in hub.tree("org/x")["README.md"].decode()
    hub.add("org/own", {"README.md": b"# mine"})
    done = run_cli(hub, home, "quantize", source, "hf://org/own", "--verify")
    assert "stays as it is" in done.err
    assert hub.tree("org/own")["README.md"] == b"# mine"


def test_a_plan_and_a_local_target_name_the_commit(hub, tmp_path):
    head = hub.repositories["org/tiny-ling-v2"].refs["main"]
    done = run_cli(
        hub, tmp_path / "home", "plan", "hf://org/tiny-ling-v2", tmp_path / "x", "--dtype", "fp8",
        "-o", tmp_path / "plan.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.err
    assert f"hf://org/tiny-ling-v2@{head}" in done.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["sources"][0]["uri"].endswith(head)
    assert not (tmp_path / "x").exists()
    assert tree_digest(tmp_path / "home") == {} or TOKEN not in done.err
