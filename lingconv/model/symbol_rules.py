"""Named rules and spellings: what a family file's symbols need beyond looking up a key.

A rule gets the value found under the symbol's own key (None when the key is missing or null) and
the symbols read before it, and returns the symbol's value. A spelling says how a format writes a
value, and reads it back. Family files refer to both by name, so that they stay data.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lingconv.errors import CheckpointError
from lingconv.errors.value_kinds import Kind, shown

Symbols = Mapping[str, Any]


def head_dim(own: Any, symbols: Symbols) -> Any:
    """Return the key's value, else hidden / heads (BailingMoeV2Config does the same)."""
    return own if own is not None else symbols["hidden"] // symbols["heads"]


def rotary_dim(own: Any, symbols: Symbols) -> Any:
    """Return `rotary_dim`, else partial_rotary_factor (at most 1) x head_dim, else 64.

    Ling-1T has only the first key, mini and flash only the factor. The modeling file's own default
    (all of head_dim) would be wrong for Ling-1T.
    """
    if not own:
        return 64
    if own <= 1:
        return int(own * symbols["head_dim"])
    return int(own) if own == int(own) else own


def rotary_factor(own: Any, symbols: Symbols) -> Any:
    """Return the share of head_dim that is rotated, whatever key said so."""
    return symbols["rotary_dim"] / symbols["head_dim"]


def shared_width(own: Any, symbols: Symbols) -> Any:
    """Return the key's value, else moe_intermediate_size x num_shared_experts (Ling-1T)."""
    return own if own is not None else symbols["expert_width"] * symbols["shared_experts"]


def groups_or_one(own: Any, symbols: Symbols) -> Any:
    """Return the number of expert groups; Ling's converter writes 0 for "no groups"."""
    return own or 1


def dense_layers(own: Any, symbols: Symbols) -> Any:
    """Return how many leading layers are dense, never more than there are layers."""
    return min(own or 0, symbols["layers"])


def all_layers(own: Any, symbols: Symbols) -> Any:
    """Return the number of decoder layers and MTP layers together."""
    return symbols["layers"] + symbols["mtp_layers"]


def original_positions(own: Any, symbols: Symbols) -> Any:
    """Return the context length before YaRN stretched it, else the one that the config states."""
    return own or symbols["max_position_embeddings"]


def yarn_attention_factor(own: Any, symbols: Symbols) -> Any:
    """Return the factor on cos and sin that YaRN is given, or 0: it follows from the stretch.

    As transformers 5 has it (modeling_rope_utils.py): the key, else the quotient of two magnitudes
    (DeepSeek's `mscale` and `mscale_all_dim`) where both are given.
    """
    mscale, all_dim = symbols["yarn_mscale"], symbols["yarn_mscale_all_dim"]
    if own or not mscale or not all_dim:
        return own or 0.0
    factor = rope_stretch(symbols)
    return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """Return YaRN's factor on cos and sin for a stretch by `factor` (arXiv 2309.00071, eq. 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_stretch(symbols: Symbols) -> float:
    """Return how many times longer a scaled context is than the original one."""
    given = float(symbols["rope_factor"])
    return given or symbols["max_position_embeddings"] / symbols["yarn_original_positions"]


def has_decoder(own: Any, symbols: Symbols) -> Any:
    """Return whether this is a whole model, not a stand-alone MTP export."""
    return symbols["layers"] > 0


def own_head(own: Any, symbols: Symbols) -> Any:
    """Return whether the output matrix is stored apart from the embedding."""
    return symbols["whole"] and not symbols["tied"]


def has_shared(own: Any, symbols: Symbols) -> Any:
    """Return whether MoE layers have shared experts."""
    return symbols["shared_experts"] > 0


class Rule(NamedTuple):
    """A rule: `takes` are the kinds of what stands under the symbol's own key, `gives` its own."""

    value: Callable[[Any, Symbols], Any]
    gives: Kind
    takes: tuple[Kind, ...] = ()


RULES: dict[str, Rule] = {
    "head_dim": Rule(head_dim, Kind.INT, (Kind.INT,)),
    "rotary_dim": Rule(rotary_dim, Kind.INT, (Kind.FLOAT,)),
    "rotary_factor": Rule(rotary_factor, Kind.FLOAT, (Kind.FLOAT,)),
    "shared_width": Rule(shared_width, Kind.INT, (Kind.INT,)),
    "groups_or_one": Rule(groups_or_one, Kind.INT, (Kind.INT,)),
    "dense_layers": Rule(dense_layers, Kind.INT, (Kind.INT,)),
    "all_layers": Rule(all_layers, Kind.INT),
    "original_positions": Rule(original_positions, Kind.INT, (Kind.INT,)),
    "yarn_attention_factor": Rule(yarn_attention_factor, Kind.FLOAT, (Kind.FLOAT,)),
    "has_decoder": Rule(has_decoder, Kind.BOOL),
    "own_head": Rule(own_head, Kind.BOOL),
    "has_shared": Rule(has_shared, Kind.BOOL),
}


def symbols_from_sizes(sizes: Symbols, present: Mapping[str, bool]) -> dict[str, Any]:
    """Return the symbols that follow from sizes, and from the tensors that are there."""
    found = {**sizes, **{name: there for name, there in present.items() if name in _SWITCHES}}
    found["tied"] = not present.get("own_head", True)
    if found.get("shared_width") and found.get("expert_width"):
        found["shared_experts"] = found["shared_width"] // found["expert_width"]
    elif not present.get("has_shared", False):
        found["shared_experts"] = found["shared_width"] = 0
    return found


_SWITCHES = ("qk_norm", "qkv_bias", "dense_bias", "expert_bias")


def megatron_notes(symbols: Symbols) -> list[str]:
    """Return where Megatron computes otherwise than the modeling file that the weights come from.

    It scores a group by its best `topk // group_topk` experts, the modeling file always by two, and
    always normalises the weights of sigmoid routers.
    """
    notes = []
    groups, chosen = symbols["groups_per_token"], symbols["experts_per_token"]
    if symbols["experts"] and symbols["expert_groups"] > 1 and chosen // groups != 2:
        notes.append(
            f"Megatron scores a group by its {chosen // groups} best experts (moe_router_topk"
            f" {chosen} // moe_router_group_topk {groups}), the model by its 2 best: other experts"
            " will be chosen"
        )
    if not symbols["norm_topk_prob"]:
        notes.append("Megatron normalises the weights of the chosen experts, the model does not")
    return notes


class Spelling(NamedTuple):
    """How a format writes a symbol: `write` may return None for "leave the key out".

    Both get the symbols: `read` those above the symbol itself, `write` all of them. `stored` are
    the kinds that the format has under its key, where they are not the symbol's.
    """

    read: Callable[[Any, Symbols], Any]
    write: Callable[[Any, Symbols], Any]
    stored: tuple[Kind, ...] = ()


# llama_expert_gating_func_type in src/llama-hparams.h of github.com/ggml-org/llama.cpp.
_GATING_FUNCTIONS = {1: "softmax", 2: "sigmoid"}
_GATING_NUMBERS = {name: number for number, name in _GATING_FUNCTIONS.items()}


def _as_it_is(own: Any, symbols: Symbols) -> Any:
    return own


def _if_yarn(own: Any, symbols: Symbols) -> Any:
    return own if symbols["rope_scaling"] == "yarn" and own else None


def _if_scaled(own: Any, symbols: Symbols) -> Any:
    return own if symbols["rope_scaling"] != "default" and own else None


def _read_rope_scaling(own: Any, symbols: Symbols) -> Any:
    return "default" if own == "none" else own


def _rope_scaling_of_llama_cpp(own: Any, symbols: Symbols) -> Any:
    return _scaling_among(own, ("linear", "yarn"), "GGUF has")


def _is_linear(own: Any, symbols: Symbols) -> Any:
    """Return the kind of scaling that Megatron's interpolation factor stands for."""
    return "linear"


def _factor_if_linear(own: Any, symbols: Symbols) -> Any:
    """Return the factor by which Megatron divides positions; other kinds it does not have."""
    if not _scaling_among(symbols["rope_scaling"], ("linear",), "Megatron has"):
        return None
    factor = rope_stretch(symbols)
    return int(factor) if factor == int(factor) else factor


def _scaling_among(kind: str, known: tuple[str, ...], who: str) -> str | None:
    """Return a kind of RoPE scaling, or None for none; raise CheckpointError for an unknown one."""
    if kind == "default":
        return None
    if kind in known:
        return kind
    raise CheckpointError(
        f"config.json: `rope_scaling` is {shown(kind)}, and {who} only {' and '.join(known)}",
        hint="to convert it for the context that it had before, pass `settings=rope_scaling=null`",
    )


def _read_beside_usual(own: Any, symbols: Symbols) -> Any:
    return own * yarn_magnitude(rope_stretch(symbols))


def _write_beside_usual(own: Any, symbols: Symbols) -> Any:
    """Return what llama.cpp multiplies its own magnitude of YaRN by (ggml's rope_yarn)."""
    factor = _if_yarn(own, symbols)
    return factor / yarn_magnitude(rope_stretch(symbols)) if factor else None


def _unread(own: Any, symbols: Symbols) -> Any:
    """Return nothing: the key is written for people, and the format's runtime does not read it."""
    return None


def _read_gating_function(own: Any, symbols: Symbols) -> Any:
    if own not in _GATING_FUNCTIONS:
        raise ValueError(f"is {own}, no known gating function")
    return _GATING_FUNCTIONS[own]


def _write_gating_function(own: Any, symbols: Symbols) -> Any:
    if own not in _GATING_NUMBERS:
        raise CheckpointError(
            f"llama.cpp has no gating function {shown(own)}, only {' and '.join(_GATING_NUMBERS)}"
        )
    return _GATING_NUMBERS[own]


def _without_mtp_layers(own: Any, symbols: Symbols) -> Any:
    return own - symbols["mtp_layers"]


def _with_mtp_layers(own: Any, symbols: Symbols) -> Any:
    return own + symbols["mtp_layers"]


def _read_widths(own: Any, symbols: Symbols) -> Any:
    return own // symbols["expert_width"]


def _nothing(own: Any, symbols: Symbols) -> Any:
    return None


def _opposite(own: Any, symbols: Symbols) -> Any:
    return not own


def _read_layer_frequency(own: Any, symbols: Symbols) -> Any:
    """Return the number of leading dense layers: 2 for [0, 0, 1, 1]; 1 stands for none at all."""
    pattern = [1] if own == 1 else list(own)
    dense = pattern.index(1) if 1 in pattern else len(pattern)
    if any(layer != 1 for layer in pattern[dense:]):
        raise ValueError("has dense layers behind one with experts")
    return dense


def _write_layer_frequency(own: Any, symbols: Symbols) -> Any:
    return [0] * own + [1] * (symbols["layers"] - own)


def _share_of_head_dim(own: Any, symbols: Symbols) -> Any:
    return own / symbols["head_dim"]


AS_IT_IS = Spelling(_as_it_is, _as_it_is)
UNREAD = Spelling(_unread, _if_yarn, (Kind.FLOAT,))
SPELLINGS: dict[str, Spelling] = {
    "with_mtp_layers": Spelling(_without_mtp_layers, _with_mtp_layers),
    "gating_function": Spelling(_read_gating_function, _write_gating_function, (Kind.INT,)),
    "rope_scaling": Spelling(_read_rope_scaling, _if_scaled),
    "llama_cpp_rope_scaling": Spelling(_read_rope_scaling, _rope_scaling_of_llama_cpp),
    "linear_rope_scaling": Spelling(_is_linear, _factor_if_linear, (Kind.FLOAT,)),
    "factor_if_linear": Spelling(_as_it_is, _factor_if_linear, (Kind.FLOAT,)),
    "if_scaled": Spelling(_as_it_is, _if_scaled),
    "if_yarn": Spelling(_as_it_is, _if_yarn),
    "unread_if_yarn": UNREAD,
    "beside_llama_cpps_magnitude": Spelling(_read_beside_usual, _write_beside_usual, (Kind.FLOAT,)),
    "widths_of_an_expert": Spelling(_read_widths, _nothing),
    "opposite": Spelling(_opposite, _opposite),
    "layer_frequency": Spelling(
        _read_layer_frequency, _write_layer_frequency, (Kind.INT, Kind.LIST)
    ),
    "share_of_head_dim": Spelling(_as_it_is, _share_of_head_dim, (Kind.FLOAT,)),
}
