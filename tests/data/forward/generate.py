"""Makes the checkpoints of this folder and what inclusionAI's own code computes from them.

    python generate.py MODELS_DIR

MODELS_DIR is `models/` of github.com/inclusionAI/Ling-V2 at af8837e; run with transformers 4.56.2
and torch. The tests read the results, never this file. Weights are random, stored in BF16 and run
in float32, as they are stored.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
COMMON = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000,
    "rope_scaling": None,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "use_cache": False,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
CASES = {
    # Two dense layers, two groups of four, heads wider than the model, biases, odd sizes.
    "wide-heads": {
        "vocab_size": 300, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "intermediate_size": 200, "num_hidden_layers": 4,
        "first_k_dense_replace": 2, "num_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "moe_intermediate_size": 40, "num_shared_experts": 2,
        "max_position_embeddings": 512, "partial_rotary_factor": 0.5, "use_qk_norm": True,
        "use_qkv_bias": True, "use_bias": True, "num_nextn_predict_layers": 0,
    },
    # `rotary_dim` in place of the factor, YaRN, one KV head, no QK norm, all layers MoE.
    "yarn": {
        "vocab_size": 257, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 24, "intermediate_size": 100, "num_hidden_layers": 2,
        "first_k_dense_replace": 0, "num_experts": 6, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 36, "num_shared_experts": 1,
        "max_position_embeddings": 64, "rotary_dim": 12, "use_qk_norm": False,
        "use_qkv_bias": False, "use_bias": False, "num_nextn_predict_layers": 1,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    # Two MTP layers, one group, one expert per token, no shared expert.
    "two-mtp": {
        "vocab_size": 130, "hidden_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 24, "intermediate_size": 64, "num_hidden_layers": 2,
        "first_k_dense_replace": 1, "num_experts": 4, "num_experts_per_tok": 1, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 20, "num_shared_experts": None,
        "max_position_embeddings": 128, "partial_rotary_factor": 1.0, "use_qk_norm": True,
        "use_qkv_bias": False, "use_bias": False, "num_nextn_predict_layers": 2,
    },
}  # fmt: skip


def random_weights(model, generator):
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("expert_bias"):
            state[name] = noise * 0.05
        elif value.dim() == 1:
            state[name] = (1 + 0.2 * noise if "norm" in name else 0.1 * noise).bfloat16()
        elif "word_embeddings" in name or "mlp.gate.weight" in name:
            state[name] = noise.mul(0.5).bfloat16()
        else:
            state[name] = (noise * value.shape[1] ** -0.5).bfloat16()
    return state


@torch.no_grad()
def expected(model, input_ids):
    out = model(
        input_ids=input_ids, output_hidden_states=True, output_router_logits=True, return_dict=True
    )
    tensors = {"input_ids": input_ids, "logits": out.logits}
    tensors |= {f"hidden_states.{i}": h for i, h in enumerate(out.hidden_states)}
    for i, (logits, topk) in enumerate(out.router_logits):
        tensors[f"router_logits.{i}"] = logits
        tensors[f"router_topk.{i}"] = topk.to(torch.int32)
    mtp = model.config.num_nextn_predict_layers
    for i, hidden in enumerate(out.hidden_states[len(out.hidden_states) - mtp :]):
        tensors[f"mtp_logits.{i}"] = model.lm_head(hidden).float()
    return {name: value.contiguous() for name, value in tensors.items()}


def main(models):
    sys.path.insert(0, models)
    from configuration_bailing_moe_v2 import BailingMoeV2Config
    from modeling_bailing_moe_v2 import BailingMoeV2ForCausalLM

    for number, (case, values) in enumerate(CASES.items()):
        config = {**COMMON, **values}
        run = dict(config)
        if "rotary_dim" in run:  # the modeling file knows the factor only
            run["partial_rotary_factor"] = run.pop("rotary_dim") / run["head_dim"]
        model = BailingMoeV2ForCausalLM._from_config(
            BailingMoeV2Config(**run), attn_implementation="eager"
        )
        # One head serves every MTP layer; the modeling file's own loop over them handles just one.
        generator = torch.Generator().manual_seed(number)
        weights = random_weights(model, generator)
        model.load_state_dict({name: value.float() for name, value in weights.items()})
        model.eval().float()
        mtp, model.num_nextn_predict_layers = model.num_nextn_predict_layers, 0
        input_ids = torch.randint(config["vocab_size"], (2, 14), generator=generator)
        results = expected(model, input_ids)
        model.num_nextn_predict_layers = mtp
        folder = HERE / case
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        save_file(results, HERE / f"{case}.expected.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
