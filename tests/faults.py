"""Ways in which a conversion goes wrong in practice, each planted into a good one.

A fault alters a finished checkpoint with the real safetensors library: `plant` gets all tensors and
the config, and changes them. `base` names the good conversion that it is planted into.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

LAYER = "model.layers.{}."
QKV = LAYER + "attention.query_key_value.weight"
EXPERT = LAYER + "mlp.experts.{}.{}_proj.weight"
FP8_WEIGHT = EXPERT.format(1, 3, "up")
HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 4, 2, 64, 8


@dataclass(frozen=True)
class Fault:
    """`culprit` is what the first findings have to name."""

    title: str
    base: str
    culprit: str
    plant: Callable[[dict, dict], None]


FAULTS: list[Fault] = []


def fault(title, culprit, base="bf16"):
    def register(plant):
        FAULTS.append(Fault(title, base, culprit, plant))
        return plant

    return register


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


@fault("QKV left in Megatron's order (per group)", "layers.0.q: its row")
def qkv_grouped(tensors, config):
    name = QKV.format(0)
    q, k, v = tensors[name].split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM])
    groups = [part.chunk(KV_HEADS) for part in (q, k, v)]
    tensors[name] = torch.cat([part[g] for g in range(KV_HEADS) for part in groups])


@fault("Q and K permuted for interleaved rotary", "layers.0.q: its row")
def rope_permuted(tensors, config):
    name = QKV.format(0)
    q, rest = tensors[name].split([HEADS * HEAD_DIM, 2 * KV_HEADS * HEAD_DIM])
    q = q.view(HEADS, 2, HEAD_DIM // 2, -1).transpose(1, 2).reshape(q.shape)
    tensors[name] = torch.cat([q, rest])


@fault("K and V swapped", "layers.1.k: holds what SRC has as layers.1.v")
def kv_swapped(tensors, config):
    name = QKV.format(1)
    q, k, v = tensors[name].split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM])
    tensors[name] = torch.cat([q, v, k])


@fault("gate and up of a dense layer swapped", "layers.0.gate: holds what SRC has as layers.0.up")
def dense_swapped(tensors, config):
    prefix = LAYER.format(0) + "mlp."
    swap(tensors, prefix + "gate_proj.weight", prefix + "up_proj.weight")


@fault(
    "gate and up of one expert swapped",
    "layers.1.experts.5.gate: holds what SRC has as layers.1.experts.5.up",
)
def expert_swapped(tensors, config):
    swap(tensors, EXPERT.format(1, 5, "gate"), EXPERT.format(1, 5, "up"))


@fault("experts shifted by one", "holds what SRC has as layers.1.experts.")
def experts_shifted(tensors, config):
    for part in ("gate", "up", "down"):
        names = [EXPERT.format(1, e, part) for e in range(EXPERTS)]
        values = [tensors[name] for name in names]
        tensors.update(zip(names, values[1:] + values[:1], strict=True))


@fault(
    "two experts exchanged",
    "layers.1.experts.2.gate: holds what SRC has as layers.1.experts.6.gate",
)
def experts_exchanged(tensors, config):
    for part in ("gate", "up", "down"):
        swap(tensors, EXPERT.format(1, 2, part), EXPERT.format(1, 6, part))


@fault("one expert of one layer zeroed", "layers.1.experts.4.gate: its sampled rows are all zero")
def expert_zeroed(tensors, config):
    for part in ("gate", "up", "down"):
        tensors[EXPERT.format(1, 4, part)].zero_()


@fault("one expert missing", "layers.1.experts.7.down")
def expert_missing(tensors, config):
    del tensors[EXPERT.format(1, 7, "down")]


@fault("shared experts of the MTP layer zeroed", "mtp.0.shared.gate: its sampled rows are all zero")
def shared_zeroed(tensors, config):
    for part in ("gate", "up", "down"):
        tensors[LAYER.format(2) + f"mlp.shared_experts.{part}_proj.weight"].zero_()


@fault("a square weight transposed", "layers.1.o: is transposed")
def transposed(tensors, config):
    name = LAYER.format(1) + "attention.dense.weight"
    tensors[name] = tensors[name].T.contiguous()


@fault("one bit of one weight flipped", "layers.1.experts.0.up: 1 of 32,768 elements differ")
def bit_flipped(tensors, config):
    name = EXPERT.format(1, 0, "up")
    tensors[name].view(torch.int16)[17, 5] ^= 1


@fault(
    "the end of a file never written (zeros)", "layers.0.down: 65,536 of 131,072 elements differ"
)
def hole(tensors, config):
    weight = tensors[LAYER.format(0) + "mlp.down_proj.weight"]
    weight[weight.shape[0] // 2 :] = 0


@fault("NaN in one weight", "layers.1.shared.up: 1 of 32,768 elements")
def nan(tensors, config):
    tensors[LAYER.format(1) + "mlp.shared_experts.up_proj.weight"][3, 3] = float("nan")


@fault("expert_bias dropped", "layers.1.expert_bias")
def bias_dropped(tensors, config):
    del tensors[LAYER.format(1) + "mlp.gate.expert_bias"]


@fault("expert_bias zeroed", "layers.1.expert_bias: its sampled rows are all zero")
def bias_zeroed(tensors, config):
    tensors[LAYER.format(1) + "mlp.gate.expert_bias"].zero_()


@fault("expert_bias rounded to BF16", "layers.1.expert_bias")
def bias_rounded(tensors, config):
    name = LAYER.format(1) + "mlp.gate.expert_bias"
    tensors[name] = tensors[name].bfloat16()


@fault("rotary over the whole head", "`rotary_dim` is 32 in SRC, 64 in DST")
def rotary(tensors, config):
    config["partial_rotary_factor"] = 1.0


@fault("rope_theta of the 4k pre-training", "`rope_theta` is 600000 in SRC, 10000 in DST")
def theta(tensors, config):
    config["rope_theta"] = 10000


@fault("routed_scaling_factor left out", "`routed_scaling_factor` is 2.5 in SRC, 1.0 in DST")
def scaling(tensors, config):
    del config["routed_scaling_factor"]


@fault("expert groups lost", "`n_group` is 2 in SRC, 1 in DST")
def groups(tensors, config):
    config["n_group"] = config["topk_group"] = 0


@fault("norms of two layers swapped", "holds what SRC has as layers.1.attention_norm")
def norms_swapped(tensors, config):
    swap(tensors, *(LAYER.format(layer) + "input_layernorm.weight" for layer in (0, 1)))


@fault("query and key norm swapped", "layers.0.q_norm: holds what SRC has as layers.0.k_norm")
def qk_norms_swapped(tensors, config):
    swap(tensors, *(LAYER.format(0) + f"attention.{x}_layernorm.weight" for x in ("query", "key")))


@fault("attention of two layers exchanged", "layers.1.k: holds what SRC has as layers.0.k")
def layers_exchanged(tensors, config):
    swap(tensors, QKV.format(0), QKV.format(1))


@fault("embedding stored as the head", "head: holds what SRC has as embedding")
def tied(tensors, config):
    tensors["lm_head.weight"] = tensors["model.word_embeddings.weight"].clone()


@fault("MTP layer missing, config still asks for it", "mtp.0.")
def mtp_missing(tensors, config):
    for name in [name for name in tensors if name.startswith(LAYER.format(2))]:
        del tensors[name]


@fault("MTP layer missing, config agrees", "`num_nextn_predict_layers` is 1 in SRC, 0 in DST")
def mtp_gone(tensors, config):
    mtp_missing(tensors, config)
    config["num_nextn_predict_layers"] = 0


@fault("halves of eh_proj swapped", "mtp.0.eh_proj")
def eh_proj(tensors, config):
    name = LAYER.format(2) + "eh_proj.weight"
    tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)


@fault("last vocabulary rows cut, config agrees", "`vocab_size` is 512 in SRC, 500 in DST")
def vocabulary_cut(tensors, config):
    config["vocab_size"] = 500
    for name in ("lm_head.weight", "model.word_embeddings.weight"):
        tensors[name] = tensors[name][:500].contiguous()


@fault("last vocabulary rows zeroed", "embedding: ")
def vocabulary_zeroed(tensors, config):
    tensors["model.word_embeddings.weight"][500:] = 0


@fault("scale not applied on the way from FP8", "times as large: a scale was lost", "from_fp8")
def scale_lost(tensors, config):
    tensors[FP8_WEIGHT] = tensors[FP8_WEIGHT] * 2048


@fault("scale applied twice", "times as large: a scale was lost, or applied twice", "from_fp8")
def scale_twice(tensors, config):
    tensors[FP8_WEIGHT] = tensors[FP8_WEIGHT] / 1024


@fault(
    "scales of one weight inverted", "layers.1.mlp.experts.3.up_proj.weight: 2 of 2 scales", "fp8"
)
def scale_inverted(tensors, config):
    tensors[FP8_WEIGHT + "_scale_inv"] = 1 / tensors[FP8_WEIGHT + "_scale_inv"]


@fault("scale grid transposed", "attention.dense.weight: 2 of 4 scales", "fp8")
def grid_transposed(tensors, config):
    name = LAYER.format(1) + "attention.dense.weight_scale_inv"
    tensors[name] = tensors[name].T.contiguous()


@fault("scales of QKV left in Megatron's order", "query_key_value.weight: ", "fp8")
def grid_permuted(tensors, config):
    name = QKV.format(0) + "_scale_inv"
    tensors[name] = tensors[name].flip(0).contiguous()


@fault(
    "one scale half as large (a saturated block)", "1 of 2 scales are wrong: scale [0, 1]", "fp8"
)
def scale_halved(tensors, config):
    tensors[FP8_WEIGHT + "_scale_inv"][0, 1] /= 2


@fault("label ue8m0 on float32 scales", "no power of two, and the config says `ue8m0`", "fp8")
def mislabelled(tensors, config):
    config["quantization_config"]["scale_fmt"] = "ue8m0"


@fault("E8M0 bytes copied as floats", "its weights call for", "fp8")
def e8m0_as_floats(tensors, config):
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = tensors[name].log2().ceil() + 127


@fault("a scale dropped", "FP8 weight without its scale", "fp8")
def scale_dropped(tensors, config):
    del tensors[FP8_WEIGHT + "_scale_inv"]


@fault("quantization_config lost", "has no `quantization_config`", "fp8")
def label_lost(tensors, config):
    del config["quantization_config"]


@fault(
    "an FP8 weight listed as not converted", "layers.1.mlp.experts.3.up_proj.weight: is FP8", "fp8"
)
def label_wrong(tensors, config):
    kept = config["quantization_config"]["modules_to_not_convert"]
    kept.append(FP8_WEIGHT.removesuffix(".weight"))
