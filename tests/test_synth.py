"""Synthetic checkpoints: reproducible, realistic, any size."""

import json

import pytest
import torch

from lingconv import CheckpointError, ConvertOptions, Resources, UsageError, inspect, plan, synth
from lingconv.model.family_file import presets
from tests.support import read_tensors, tree_digest


def test_same_seed_same_bytes_whatever_the_threads(tmp_path):
    for name, jobs in (("a", 1), ("b", 5)):
        synth("tiny", tmp_path / name, seed=3, resources=Resources(jobs=jobs))
    synth("tiny", tmp_path / "c", seed=4)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")
    one, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "c")
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_shard_sizes_do_not_change_values(tmp_path):
    synth("tiny", tmp_path / "a")
    synth("tiny", tmp_path / "b", ConvertOptions(max_shard_bytes=100_000))
    one, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_look_real_and_are_sound(tmp_path):
    synth("tiny", tmp_path / "a", mtp=1)
    assert inspect(tmp_path / "a").faults == ()
    for name, values in read_tensors(tmp_path / "a").items():
        values = values.float()
        assert values.isfinite().all()
        if "norm" in name:
            assert 0.9 < values.mean() < 1.1
        elif name.endswith("expert_bias"):
            assert abs(values.sum()) < 1e-6
            assert values.abs().max() > 0
        else:
            assert 0.015 < values.std() < 0.05, name


def test_depth_can_be_cut(tmp_path):
    synth("tiny", tmp_path / "a", layers=5, dense_layers=2, mtp=0)
    report = inspect(tmp_path / "a")
    assert (report.layers, report.dense_layers, report.mtp_layers) == (5, 2, 0)
    assert report.sound


def test_headers_only_is_sparse_and_can_be_planned(tmp_path):
    synth("ling-mini-2.0", tmp_path / "a", headers_only=True)
    report = inspect(tmp_path / "a")
    assert report.parameters == 16_255_643_392
    assert report.faults == ()
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "a").iterdir())
    assert used < 20_000_000 < report.file_bytes
    assert plan(tmp_path / "a", ConvertOptions(dtype="fp8")).read_bytes == report.tensor_bytes


def test_sparse_files_are_not_taken_for_finished_ones(tmp_path):
    from lingconv import DestinationError

    synth("tiny", tmp_path / "a", headers_only=True)
    with pytest.raises(DestinationError) as caught:
        synth("tiny", tmp_path / "a")
    assert "option headers_only: was true, now false" in caught.value.details


def test_a_model_without_experts(tmp_path):
    config = json.loads((presets()["tiny"]).read_text())
    config.update(num_experts=0, num_experts_per_tok=0, first_k_dense_replace=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    synth(tmp_path / "config.json", tmp_path / "a", mtp=0)
    report = inspect(tmp_path / "a")
    assert report.sound
    assert report.active_parameters == report.parameters


def test_straight_to_fp8(tmp_path):
    synth("tiny", tmp_path / "a", ConvertOptions(dtype="fp8"))
    assert "fp8-block f32 scales" in inspect(tmp_path / "a").encodings


def test_the_tokenizer_reads_every_byte(tmp_path):
    from tokenizers import Tokenizer

    synth("tiny", tmp_path / "a")
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    text = "Ling <|role_end|> naïve 语言 \x00\x7f\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids) < 512
    assert 2 in ids


def test_configs_that_make_nothing(tmp_path):
    with pytest.raises(UsageError, match="neither a preset") as caught:
        synth("ling-2t", tmp_path / "a")
    assert "ling-1t" in caught.value.hint
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        synth(tmp_path / "config.json", tmp_path / "a")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(CheckpointError, match="does not describe"):
        synth(tmp_path / "config.json", tmp_path / "a")
