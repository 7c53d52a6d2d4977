"""diff: what is stored, name by name."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import lingconv
from lingconv import CheckpointError, ConvertOptions
from lingconv.cli.app import app
from tests.support import edit_json, rewrite


def differences(a, b, **options):
    return [tuple(difference) for difference in lingconv.diff(a, b, **options).differences]


@pytest.fixture
def other(golden, tmp_path):
    return shutil.copytree(golden, tmp_path / "other")


def test_other_shards_are_no_difference(golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", ConvertOptions(max_shard_bytes=700_000))
    found = lingconv.diff(golden, tmp_path / "out")
    assert found.differences == ()
    assert found.tensors == 86
    assert found.bytes_read == 2 * 6_305_888 - 2 * (6_305_888 - found.bytes_read // 2)


def test_every_kind_of_difference(golden, other):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["new"] = torch.ones(2)
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = head[:500].contiguous()
        gate = tensors["model.layers.1.mlp.gate.weight"]
        tensors["model.layers.1.mlp.gate.weight"] = gate.float()
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].float()
        tensors[name][1, 2] += 0.5
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 3.0

    rewrite(other, change)
    edit_json(other / "config.json", lambda c: c.update(rope_scaling={"type": "yarn"}, new=1))
    (other / "tokenizer_config.json").unlink()
    (other / "notes.txt").write_text("x")
    generation = (other / "generation_config.json").read_text()
    (other / "generation_config.json").write_text(generation.replace("0", "9", 1))
    found = differences(golden, other)
    named = {(kind, name): message for kind, name, message in found}
    assert named["only-in-a", "model.norm.weight"] == "BF16 [256]"
    assert named["only-in-b", "new"] == "F32 [2]"
    assert named["shape", "lm_head.weight"] == "[512, 256] and [500, 256]"
    assert named["dtype", "model.layers.1.mlp.gate.weight"] == "BF16 and F32"
    assert ("values", "model.layers.1.mlp.gate.weight") not in named  # the same numbers
    up = named["values", "model.layers.0.mlp.up_proj.weight"]
    assert up == "1 of 131,072 elements, by up to 0.5"
    assert "1 of 131,072" in named["values", "model.layers.0.mlp.down_proj.weight"]
    assert named["config", "rope_scaling"] == "None and {'type': 'yarn'}"
    assert named["config", "new"] == "not there and 1"
    assert named["file", "tokenizer_config.json"] == "only in A"
    assert named["file", "notes.txt"] == "only in B"
    assert named["file", "generation_config.json"] == "other content of the same size"
    assert len(found) == 12
    without = differences(golden, other, values=False)
    assert without == [each for each in found if each[0] != "values"]


def test_fp8_codes_are_compared_as_bytes(golden_block, tmp_path):
    other = shutil.copytree(golden_block, tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(other, lambda tensors: tensors[name].view(torch.uint8)[0, 0].bitwise_xor_(1))
    assert differences(golden_block, other) == [("values", name, "other bytes")]


def test_no_family_is_needed(golden, other):
    for folder in (golden, other):
        assert (folder / "config.json").exists()
    edit_json(other / "config.json", lambda config: config.update(architectures=["Unknown"]))
    (found,) = differences(golden, other)
    assert found[:2] == ("config", "architectures")


def test_a_broken_shard_is_refused(golden, other):
    shard = other / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        lingconv.diff(golden, other)


def test_the_command_answers_with_its_code(golden, other):
    done = CliRunner().invoke(app, ["diff", str(golden), str(other)])
    assert (done.exit_code, done.stdout.split(";")[0]) == (0, "nothing differs")
    (other / "tokenizer_config.json").unlink()
    done = CliRunner().invoke(app, ["diff", str(golden), str(other), "--json"])
    assert done.exit_code == 1
    value = json.loads(done.stdout)
    assert value["same"] is False
    assert value["differences"][0]["name"] == "tokenizer_config.json"
    assert CliRunner().invoke(app, ["diff", str(golden), str(other), "-q"]).stdout == "differ\n"
