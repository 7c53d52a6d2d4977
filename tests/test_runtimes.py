"""What runtimes accept of a checkpoint: said in the plan, claimed in a card only if it holds."""

import json

import pytest

import lingconv
from lingconv import ConvertOptions, Fp8Options
from lingconv.plans.runtimes import runtimes, tensor_parallel

BLOCKS = {"quantization_config": {"weight_block_size": [128, 128]}}
MINI = {"moe_intermediate_size": 512, "intermediate_size": 5120, "num_attention_heads": 16}
FLASH = {"moe_intermediate_size": 1024, "intermediate_size": 9216, "num_attention_heads": 32}
LARGE = {"moe_intermediate_size": 2048, "intermediate_size": 18432, "num_attention_heads": 64}


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (MINI, 8),
        (MINI | BLOCKS, 4),  # vLLM's validate_fp8_block_shape: 64 rows are half a block
        (FLASH | BLOCKS, 8),
        (LARGE | BLOCKS, 8),
        ({"moe_intermediate_size": 192, "num_attention_heads": 16} | BLOCKS, 1),
        ({"num_attention_heads": 6}, 2),
    ],
)
def test_the_most_gpus_that_leave_whole_blocks(config, size):
    assert tensor_parallel(config) == size


def test_every_entry_says_where_it_was_read():
    for each in runtimes():
        assert each.version
        assert each.source
        assert "{repository}" in each.command


@pytest.mark.parametrize(
    ("ignore", "told"),
    [
        (("*.down_proj", "re:.*shared_experts"), True),  # down of experts apart from gate and up
        (("re:.*gate_proj",), True),
        (("*.experts.3.*",), True),
        (("*.attention.dense",), False),
        (("re:.*shared_experts",), False),
        (("*.experts.*",), False),
        ((), False),
    ],
)
def test_patterns_that_split_what_runtimes_fuse(golden, ignore, told):
    options = ConvertOptions(dtype="fp8", fp8=Fp8Options(ignore=ignore))
    warnings = [text for text in lingconv.plan(golden, options).warnings if "stored unlike" in text]
    assert len(warnings) == told
    assert all("vLLM 0.33.0 and SGLang 0.5.23" in text for text in warnings)


def test_experts_that_are_no_whole_blocks(tmp_path):
    config = {
        "architectures": ["BailingMoeV2ForCausalLM"], "hidden_size": 256, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512,
        "moe_intermediate_size": 192, "num_experts": 4, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 2,
        "partial_rotary_factor": 0.5, "vocab_size": 512, "n_group": 2, "topk_group": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    lingconv.synth(tmp_path / "config.json", tmp_path / "odd")

    def told(options):
        return [text for text in lingconv.plan(tmp_path / "odd", options).warnings if "192" in text]

    assert len(told(ConvertOptions(dtype="fp8"))) == 1
    assert told(ConvertOptions(dtype="fp8", fp8=Fp8Options(scheme="channel"))) == []
    assert told(ConvertOptions(dtype="fp8", fp8=Fp8Options(ignore=("*.experts.*",)))) == []
