"""A run in parts, as on many machines: the same bytes, whoever wrote them, killed or not."""

import json
import os
import signal

import pytest

import lingconv
from lingconv import (
    ConvertOptions,
    DestinationError,
    GgufOptions,
    Part,
    Resources,
    UsageError,
    convert,
    finish,
)
from lingconv.api import merge_checkpoints
from lingconv.plans.checkpoint_weights import mean
from tests.kit import KILL_AFTER, Instant, command, hold, start, start_command
from tests.support import copy_checkpoint, tree_digest
from tests.test_engine import StopAfter

MANY = ConvertOptions(dtype="fp8", max_shard_bytes=300_000)


def in_part(index, count):
    return Resources(part=Part(index, count), jobs=2)


def test_shares_cover_all_files_once_and_evenly(golden):
    files = lingconv.plan(golden, MANY).files
    for count in (1, 2, 3, 5, 14, 40):
        shares = [Part(index, count).of(files) for index in range(1, count + 1)]
        assert [file for share in shares for file in share] == list(files)
        sizes = [sum(file.nbytes for file in share) for share in shares]
        largest = max(file.nbytes for file in files)
        assert max(sizes) <= sum(sizes) / count + largest
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/3"):
        with pytest.raises(UsageError, match="`part"):
            Part.parse(text)
    assert Part.parse("3/16") == Part(3, 16)


@pytest.mark.parametrize("kind", ["fp8", "gguf", "megatron", "from gguf"])
def test_parts_make_what_one_run_makes(golden, tmp_path, kind):
    source, options, name = golden, MANY, "out"
    if kind == "gguf":
        gguf = GgufOptions(outtype="q8_0", max_shard_tensors=10)
        options, name = ConvertOptions(layout="gguf", gguf=gguf), "out.gguf"
    elif kind == "megatron":
        options = ConvertOptions(layout="megatron", max_shard_bytes=700_000)
    elif kind == "from gguf":
        source = tmp_path / "source.gguf"
        convert(golden, source, ConvertOptions(layout="gguf"))
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    convert(source, tmp_path / "whole" / name, options)
    target = tmp_path / "parts" / name
    for index in (2, 3, 1):  # in any order
        convert(source, target, options, resources=in_part(index, 3))
    finish(target)
    assert tree_digest(tmp_path / "parts") == tree_digest(tmp_path / "whole")


def test_parts_of_an_average(golden, golden_channel, tmp_path):
    options = ConvertOptions(dtype="bf16", max_shard_bytes=500_000)
    sources = [golden_channel, golden]
    merge_checkpoints(sources, tmp_path / "whole", mean(2), options)
    for index in (1, 2):
        merge_checkpoints(
            sources, tmp_path / "parts", mean(2), options, resources=in_part(index, 2)
        )
    finish(tmp_path / "parts")
    assert tree_digest(tmp_path / "parts") == tree_digest(tmp_path / "whole")


def test_finishing_says_what_is_missing(golden, tmp_path):
    target = tmp_path / "out"
    convert(golden, target, MANY, resources=in_part(1, 2))
    with pytest.raises(DestinationError, match="lacks 7 of 14 weight files") as caught:
        finish(target)
    assert caught.value.details[0] == "model-00008-of-00014.safetensors"
    assert not (target / "config.json").exists()
    with pytest.raises(DestinationError, match="is not finished"):
        lingconv.push(target, "hf://org/out")
    convert(golden, target, MANY, resources=in_part(2, 2))
    finish(target)
    with pytest.raises(DestinationError, match="no plan of a run in parts"):
        finish(target)
    assert not lingconv.inspect(target).faults


def test_a_part_goes_on_where_it_was(golden, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(lingconv.Interrupted):
        convert(golden, target, MANY, resources=in_part(2, 2), progress=StopAfter(2))
    result = convert(golden, target, MANY, resources=in_part(2, 2))
    assert result.files_found_finished >= 2
    assert result.files_found_finished + result.files_written == 7
    convert(golden, target, MANY)  # a whole run takes over what parts have done
    convert(golden, tmp_path / "whole", MANY)
    assert tree_digest(target) == tree_digest(tmp_path / "whole")


def test_a_file_that_was_changed_between_parts_is_noticed(golden, tmp_path):
    target = tmp_path / "out"
    for index in (1, 2):
        convert(golden, target, MANY, resources=in_part(index, 2))
    os.utime(target / "model-00003-of-00014.safetensors", ns=(5, 5))
    with pytest.raises(DestinationError, match="was changed after it was finished"):
        finish(target)


def test_what_parts_may_not_do(golden, tmp_path):
    target = tmp_path / "out"
    convert(golden, target, MANY, resources=in_part(1, 2))
    other = ConvertOptions(dtype="bf16")
    with pytest.raises(DestinationError, match="holds another conversion"):
        convert(golden, target, other, resources=in_part(2, 2))
    with pytest.raises(UsageError, match="`fresh`"):
        convert(golden, target, MANY, resources=in_part(2, 2), fresh=True)
    with pytest.raises(UsageError, match="not to a store"):
        convert(golden, "hf://org/out", MANY, resources=in_part(2, 2))
    with pytest.raises(UsageError, match="one run"):
        lingconv.synth("tiny", tmp_path / "synth", resources=in_part(1, 2))


def test_parts_of_other_sources_are_refused(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    convert(source, tmp_path / "out", MANY, resources=in_part(1, 2))
    os.utime(source / "model-00002-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(DestinationError, match="holds another conversion"):
        convert(source, tmp_path / "out", MANY, resources=in_part(2, 2))


def one_part(source, target, part):
    """Run in a child."""
    convert(source, target, MANY, resources=Resources(jobs=1, part=part))


def test_the_same_part_is_not_written_twice_at_once(golden, tmp_path):
    target = tmp_path / "out"
    second = Instant("rename", 2, hold, only="*.safetensors")
    held = start(one_part, golden, target, Part(1, 2), at=second)
    held.reached()
    for resources in (in_part(1, 2), Resources()):
        with pytest.raises(DestinationError, match="another run is writing"):
            convert(golden, target, MANY, resources=resources)
    convert(golden, target, MANY, resources=in_part(2, 2))  # others may
    held.kill()
    assert held.end().killed
    convert(golden, target, MANY, resources=in_part(1, 2))
    finish(target)
    convert(golden, tmp_path / "whole", MANY)
    assert tree_digest(target) == tree_digest(tmp_path / "whole")


def test_a_slurm_array_with_kills(golden, tmp_path):
    """Five processes begin at once on an empty folder, some are killed; all are run again."""
    convert(golden, tmp_path / "whole", MANY)
    target = tmp_path / "out"
    words = ["convert", golden, target, "--dtype", "fp8", "--max-shard-size", "300KB"]
    # Each part has two files or three, so that there is one left for the second kill.
    first = Instant("rename", 1, KILL_AFTER, only="*.safetensors")
    for killed in [{1: first, 3: first, 5: first}, {1: first, 5: first}, {}]:
        running = {
            index: start_command(*words, "--json", "-j2", "--part", f"{index}/5", at=at)
            for index, at in ((index, killed.get(index, ())) for index in range(1, 6))
        }
        ended = {index: child.end() for index, child in running.items()}
        for index, ending in ended.items():
            assert ending.exit_code == (-signal.SIGKILL if index in killed else 0), ending.err
    found = [json.loads(ending.out)["files_found_finished"] for ending in ended.values()]
    assert sum(found) >= 14 - 2  # only parts that were killed may have had something left
    done = command("finish", target)
    assert done.exit_code == 0, done.err
    assert tree_digest(target) == tree_digest(tmp_path / "whole")
