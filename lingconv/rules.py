"""Named rules: what a family file's symbols need beyond looking up a key.

A rule gets the value found under the symbol's own key (None when the key is missing or null) and
the symbols read before it, and returns the symbol's value. Family files refer to rules by name, so
that they stay data.
"""

from collections.abc import Callable, Mapping
from typing import Any

Symbols = Mapping[str, Any]
Rule = Callable[[Any, Symbols], Any]


def head_dim(own: Any, symbols: Symbols) -> Any:
    """Return the key's value, else hidden / heads (BailingMoeV2Config does the same)."""
    return own if own is not None else symbols["hidden"] // symbols["heads"]


def rotary_dim(own: Any, symbols: Symbols) -> Any:
    """Return `rotary_dim`, else partial_rotary_factor x head_dim, else 64.

    Ling-1T has only the first key, mini and flash only the factor. The modeling file's own default
    (all of head_dim) would be wrong for Ling-1T.
    """
    if own is not None:
        return own
    factor = symbols["partial_rotary_factor"]
    return int(factor * symbols["head_dim"]) if factor else 64


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


def has_decoder(own: Any, symbols: Symbols) -> Any:
    """Return whether this is a whole model, not a stand-alone MTP export."""
    return symbols["layers"] > 0


def own_head(own: Any, symbols: Symbols) -> Any:
    """Return whether the output matrix is stored apart from the embedding."""
    return symbols["whole"] and not symbols["tied"]


def has_shared(own: Any, symbols: Symbols) -> Any:
    """Return whether MoE layers have shared experts."""
    return symbols["shared_experts"] > 0


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        head_dim,
        rotary_dim,
        shared_width,
        groups_or_one,
        dense_layers,
        all_layers,
        original_positions,
        has_decoder,
        own_head,
        has_shared,
    )
}
