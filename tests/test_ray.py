"""A cluster of several nodes on this machine: the bytes of one process, whoever is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

import lingconv
from lingconv import (
    ConvertOptions,
    DestinationError,
    GgufOptions,
    PublishOptions,
    Resources,
    UsageError,
    convert,
)
from lingconv.execution.progress import Silent
from tests.hub_server import Hub
from tests.hub_support import environment, point_client_at, weight_bytes
from tests.s3_server import BUCKET, client, listing, s3
from tests.support import copy_checkpoint, edit_json, tree_digest
from tests.test_hub_read import assert_same_weights, contents

ROOT = Path(__file__).parents[1]
MANY = ConvertOptions(dtype="fp8", max_shard_bytes=300_000)
NODES = 3
ON_RAY = Resources(executor="ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own processes and sockets
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


@pytest.fixture(scope="module")
def hub():
    """A Hub that the nodes read from and send to."""
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def bucket():
    """Return the environment in which an S3 is found, and an empty bucket in it."""
    with s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        client().mkdir(BUCKET)
        yield server


@pytest.fixture(scope="module")
def cluster(hub, bucket, tmp_path_factory):
    """Nodes with a processor each; their workers can reach the Hub and the store."""
    before = dict(os.environ)
    os.environ.update(environment(hub.endpoint, tmp_path_factory.mktemp("home")))
    # Or they wait for whatever else this machine does.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes = [started.add_node(num_cpus=1) for _ in range(NODES - 1)]
    os.environ.clear()
    os.environ.update(before)
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    yield started, nodes
    ray.shutdown()
    started.shutdown()


def workers():
    """Return the processes that write files right now."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ray::_write_file" in " ".join(process.info["cmdline"] or [])
    ]


def shown(folder):
    """Return the files of a target, without the state of its run."""
    return {k: v for k, v in contents(folder).items() if not k.startswith(".")}


def killing(hub):
    """Return an action that kills all that write right now, which wait for the Hub meanwhile."""

    def kill():
        with hub.holding():
            hub.until_waiting()
            found = workers()
            for process in found:
                process.kill()
        return len(found)

    return kill


class After(Silent):
    """Does things once so many files are there."""

    def __init__(self, **actions):
        self.actions = {int(key.removeprefix("file")): action for key, action in actions.items()}
        self.count = 0
        self.done = []

    def file_ends(self, name, nbytes, seconds):
        self.count += 1
        if action := self.actions.get(self.count):
            self.done.append(action())


@pytest.mark.parametrize("kind", ["fp8", "gguf", "from gguf"])
def test_a_cluster_writes_what_one_process_writes(cluster, golden, tmp_path, kind):
    source, options, name = golden, MANY, "out"
    if kind == "gguf":
        gguf = GgufOptions(outtype="q8_0", max_shard_tensors=30)
        options, name = ConvertOptions(layout="gguf", gguf=gguf), "out.gguf"
    elif kind == "from gguf":
        source = tmp_path / "source.gguf"
        convert(golden, source, ConvertOptions(layout="gguf"))
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    convert(source, tmp_path / "here" / name, options)
    result = convert(source, tmp_path / "there" / name, options, resources=ON_RAY)
    assert tree_digest(tmp_path / "there") == tree_digest(tmp_path / "here")
    again = convert(source, tmp_path / "there" / name, options, resources=ON_RAY)
    assert (again.files_written, again.files_found_finished) == (0, result.files_written)


def test_workers_and_a_node_are_lost(cluster, hub, golden, tmp_path, monkeypatch):
    started, nodes = cluster
    point_client_at(monkeypatch, hub.endpoint, tmp_path / "home")
    hub.add("org/tiny-ling-v2", contents(golden))

    def remove_node():
        started.remove_node(nodes.pop(), allow_graceful=False)
        return 1

    trouble = After(file2=killing(hub), file4=remove_node, file7=killing(hub))
    target = tmp_path / "far"
    convert("hf://org/tiny-ling-v2", target, MANY, resources=ON_RAY, progress=trouble)
    assert trouble.count == 14
    assert all(trouble.done), trouble.done
    convert(golden, tmp_path / "local", MANY)
    assert_same_weights(tmp_path / "local", target)


DRIVER = """
import sys
import ray
from lingconv import ConvertOptions, Resources, convert
from lingconv.execution.progress import Silent

class Told(Silent):
    left = 3

    def file_ends(self, *words):
        self.left -= 1
        if not self.left:
            print("three files", flush=True)
            sys.stdin.read()

convert(sys.argv[1], sys.argv[2], ConvertOptions(dtype="fp8", max_shard_bytes=300_000),
        resources=Resources(executor="ray", address=sys.argv[3]), progress=Told())
"""


@pytest.mark.long
def test_the_driver_dies(cluster, hub, golden, tmp_path, monkeypatch):
    started, _ = cluster
    point_client_at(monkeypatch, hub.endpoint, tmp_path / "home")
    hub.add("org/tiny-ling-v2", contents(golden))
    source, target = "hf://org/tiny-ling-v2", tmp_path / "far"
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, source, target, started.address], cwd=ROOT,
        env=environment(hub.endpoint, tmp_path / "home"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as driver:  # fmt: skip
        assert driver.stdout.readline() == b"three files\n"
        driver.send_signal(signal.SIGKILL)
    assert not (target / "config.json").exists()
    result = convert(source, target, MANY, resources=ON_RAY)
    assert result.files_found_finished >= 3
    convert(golden, tmp_path / "local", MANY)
    assert_same_weights(tmp_path / "local", target)


@pytest.mark.long
def test_a_store_is_written_to_from_all_nodes(cluster, hub, golden, tmp_path, monkeypatch):
    point_client_at(monkeypatch, hub.endpoint, tmp_path / "home")
    hub.add("org/tiny-ling-v2", contents(golden))
    source, target = "hf://org/tiny-ling-v2", f"s3://{BUCKET}/out"
    trouble = After(file2=killing(hub), file6=killing(hub))
    result = convert(source, target, MANY, resources=ON_RAY, progress=trouble)
    assert trouble.count == result.files_written == 14
    assert all(trouble.done), trouble.done
    convert(golden, tmp_path / "local", MANY)
    found = listing("out")
    wanted = shown(tmp_path / "local")
    assert found.pop("lingconv.json")
    assert found == {k: v for k, v in wanted.items() if k != "lingconv.json"}
    assert weight_bytes(tmp_path / "home") == 0
    again = convert(source, target, MANY, resources=ON_RAY)
    assert (again.files_written, again.files_found_finished) == (0, 14)


@pytest.mark.long
def test_the_driver_of_a_store_dies(cluster, bucket, hub, golden, tmp_path, monkeypatch):
    started, _ = cluster
    point_client_at(monkeypatch, hub.endpoint, tmp_path / "home")
    hub.add("org/tiny-ling-v2", contents(golden))
    source, target = "hf://org/tiny-ling-v2", f"s3://{BUCKET}/after"
    own = environment(hub.endpoint, tmp_path / "home") | bucket
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, source, target, started.address], cwd=ROOT,
        env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as driver:  # fmt: skip
        assert driver.stdout.readline() == b"three files\n"
        driver.send_signal(signal.SIGKILL)
    assert "config.json" not in listing("after")
    result = convert(source, target, MANY, resources=ON_RAY)
    assert result.files_found_finished >= 2  # the third may not have been noted
    convert(golden, tmp_path / "local", MANY)
    assert listing("after").keys() == shown(tmp_path / "local").keys()


@pytest.mark.parametrize(
    "options",
    [
        PublishOptions(create=True),
        pytest.param(PublishOptions(pull_request=True), marks=pytest.mark.long),
    ],
)
def test_a_repository_is_written_to_from_all_nodes(
    cluster, hub, golden, tmp_path, monkeypatch, options
):
    point_client_at(monkeypatch, hub.endpoint, tmp_path / "home")
    name = f"org/from-nodes-{options.pull_request}"
    hub.repositories.clear()
    hub.blobs.clear()  # a file that it has already would not be sent
    if options.pull_request:
        hub.add(name, {})
    trouble = After(file3=killing(hub))
    result = convert(
        golden, f"hf://{name}", MANY, resources=ON_RAY, progress=trouble, publish=options
    )
    assert result.files_written == trouble.count == 14
    assert all(trouble.done), trouble.done
    convert(golden, tmp_path / "local", MANY)
    revision = "refs/pr/1" if options.pull_request else "main"
    found, wanted = hub.tree(name, revision), shown(tmp_path / "local")
    assert found.keys() - {"README.md", ".gitattributes"} == wanted.keys() - {"README.md"}
    for each in wanted.keys() - {"lingconv.json", "README.md"}:
        assert found[each] == wanted[each], each
    assert weight_bytes(tmp_path / "home") == 0


def test_interrupting_cancels_the_tasks(cluster, hub, golden, tmp_path, monkeypatch):
    point_client_at(monkeypatch, hub.endpoint, tmp_path / "home")
    hub.add("org/tiny-ling-v2", contents(golden))

    def interrupt():
        raise KeyboardInterrupt

    cancelled, cancel = [], ray.cancel
    monkeypatch.setattr(
        ray, "cancel", lambda task, **how: cancelled.append(task) or cancel(task, **how)
    )
    target = tmp_path / "far"
    with pytest.raises(lingconv.Interrupted):
        convert(
            "hf://org/tiny-ling-v2", target, MANY, resources=ON_RAY,
            progress=After(file2=interrupt),
        )  # fmt: skip
    assert cancelled
    ended = [was_cancelled(task) for task in cancelled]  # each waits for the end of a task
    # What a node was at may have had its name when it was stopped; what waited never began.
    assert sum(ended) > NODES
    assert len(list(target.glob("*.safetensors"))) <= 14 - sum(ended) + NODES < 14


def was_cancelled(task):
    try:
        ray.get(task)
    except ray.exceptions.RayError:
        return True
    return False


def test_errors_of_tasks_are_those_of_lingconv(cluster, golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    shard = source / "model-00002-of-00003.safetensors"

    class Broken(Silent):
        def begin(self, plan, done, jobs):
            shard.write_bytes(shard.read_bytes() + b" ")

    with pytest.raises(lingconv.CheckpointError, match="changed while it was read") as caught:
        convert(source, tmp_path / "out", MANY, resources=ON_RAY, progress=Broken())
    assert "start over with `fresh`" in caught.value.hint
    edit_json(source / "config.json", lambda config: config.update(num_experts=4))
    with pytest.raises(lingconv.CheckpointError):
        convert(source, tmp_path / "new", MANY, resources=ON_RAY)


def test_what_a_cluster_may_not_do(golden, tmp_path):
    for resources, text in [
        (Resources(executor="slurm"), "`executor=slurm`"),
        (Resources(address="auto"), "`address` is"),
    ]:
        with pytest.raises(UsageError, match=text):
            convert(golden, tmp_path / "out", MANY, resources=resources)
    in_parts = Resources(executor="ray", part=lingconv.Part(1, 2))
    with pytest.raises(UsageError, match="whole targets"):
        convert(golden, tmp_path / "out", MANY, resources=in_parts)
    convert(golden, tmp_path / "out", MANY)
    with pytest.raises(DestinationError, match="holds another conversion"):
        convert(golden, tmp_path / "out", ConvertOptions(), resources=ON_RAY)
