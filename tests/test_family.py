"""The family file describes the released models, to the tensor."""

import json
from math import prod

import pytest

from lingconv.errors import CheckpointError, UsageError
from lingconv.model.family import Role
from lingconv.model.family_file import load_families, parse_family, presets
from lingconv.model.layout import build_layout

# Tensors without MTP, and parameters (arXiv 2510.22115; for Ling-1T also what GGUF loaders print).
RELEASED = {
    "ling-mini-2.0": (14_813, 16_255_643_392),
    "ling-flash-2.0": (24_161, 102_889_705_216),
    "ling-1t": (59_243, 999_705_328_640),
}


@pytest.fixture
def family():
    return load_families()[0]


def config(name, **changes):
    return {**json.loads(presets()[name].read_text()), **changes}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_tensors_and_parameters(family, name):
    layout = build_layout(family, family.resolve(config(name), "hf"), "hf")
    sizes = [prod(tensor.shape) for tensor in layout.tensors.values()]
    assert (len(sizes), sum(sizes)) == RELEASED[name]


def test_an_mtp_layer_adds_783_tensors(family):
    symbols = family.resolve(config("ling-1t", num_nextn_predict_layers=1), "hf")
    layout = build_layout(family, symbols, "hf")
    mtp = [tensor for tensor in layout.tensors.values() if tensor.mtp]
    assert len(mtp) == 783
    assert all(tensor.name.startswith("model.layers.80.") for tensor in mtp)
    assert layout.tensors["model.layers.80.eh_proj.weight"].shape == (8192, 16384)


def test_the_fused_matrix_is_all_q_then_all_k_then_all_v(family):
    layout = build_layout(family, family.resolve(config("ling-1t"), "hf"), "hf")
    fused = layout.tensors["model.layers.7.attention.query_key_value.weight"]
    assert fused.shape == (10240, 8192)
    assert [tuple(rows)[:3] for rows in fused.rows] == [
        ("layers.7.q", 0, 8192),
        ("layers.7.k", 8192, 1024),
        ("layers.7.v", 9216, 1024),
    ]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rotary_dim": 64}, 64),
        ({"rotary_dim": 32, "partial_rotary_factor": 0.5}, 32),
        ({"partial_rotary_factor": 0.25}, 32),
        ({"rotary_dim": None, "partial_rotary_factor": None}, 64),
    ],
)
def test_rotary_rule(family, keys, expected):
    bare = {k: v for k, v in config("ling-1t").items() if k != "rotary_dim"}
    assert family.resolve({**bare, **keys}, "hf")["rotary_dim"] == expected


def test_missing_shared_width_and_zero_groups(family):
    symbols = family.resolve(config("ling-1t", n_group=0, topk_group=0, num_shared_experts=2), "hf")
    assert symbols["shared_width"] == 4096
    assert (symbols["expert_groups"], symbols["groups_per_token"]) == (1, 1)


def test_llada2_is_recognised(family):
    assert "LLaDA2MoeModelLM" in family.architectures


def test_switches_add_and_remove_tensors(family):
    def names(**changes):
        symbols = family.resolve(config("tiny", **changes), "hf")
        return set(build_layout(family, symbols, "hf").tensors)

    plain = names()
    assert plain - names(tie_word_embeddings=True) == {"lm_head.weight"}
    assert all("layernorm" in name for name in plain - names(use_qk_norm=False))
    assert {n.rsplit(".", 2)[1] for n in names(use_qkv_bias=True) - plain} == {"query_key_value"}
    assert {n.rsplit(".", 2)[1] for n in names(use_bias=True) - plain} == {"dense"}
    assert all("shared" in name for name in plain - names(num_shared_experts=0))
    assert all("expert_bias" in n for n in plain - names(moe_router_enable_expert_bias=False))


def test_roles_decide_what_is_quantized(family):
    layout = build_layout(family, family.resolve(config("tiny"), "hf"), "hf")
    kept = {t.name for t in layout.tensors.values() if not t.role.quantizable and len(t.shape) == 2}
    assert {name for name in kept if "mlp.gate" not in name} == {
        "model.word_embeddings.weight",
        "lm_head.weight",
        "model.layers.2.eh_proj.weight",
    }
    assert Role.ROUTER.is_linear_module
    assert not Role.EMBEDDING.is_linear_module


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"hidden_size": -5}, "`hidden_size` is -5, not 0 to 2,147,483,647"),
        ({"hidden_size": [1]}, "`hidden_size` is a list of 1, not a whole number"),
        ({"num_experts": 1e30}, "`num_experts` is 1e+30, not a whole number"),
        (
            {"num_attention_heads": 0, "head_dim": None},
            "`num_attention_heads` is 0, not 1 to 4,096",
        ),
    ],
)
def test_a_config_that_makes_no_model(family, changes, says):
    with pytest.raises(CheckpointError) as caught:
        family.resolve(config("tiny", **changes), "hf")
    assert len(caught.value.details) == 1
    assert says in caught.value.details[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"num_experts": 4_000_000_000},
        {"num_hidden_layers": 4_000_000_000},
        {"vocab_size": 0},
        {"num_experts": 2.5},
    ],
)
def test_a_hostile_config_is_refused_at_once(family, changes):
    with pytest.raises(CheckpointError):
        build_layout(family, family.resolve(config("tiny", **changes), "hf"), "hf")


def test_own_family_files(tmp_path, family):
    with pytest.raises(UsageError, match="no family file"):
        load_families(str(tmp_path))
    (tmp_path / "broken.toml").write_text("[family]\nname = 'x'")
    with pytest.raises(UsageError, match=r"broken\.toml is not a family file"):
        load_families(str(tmp_path))
    with pytest.raises(ValueError, match="no rule `nope`"):
        parse_family(
            {
                "family": {"name": "", "title": "", "architectures": {}},
                "tensor": [],
                "block": [],
                "symbols": {"x": {"rule": "nope"}},
            }
        )
