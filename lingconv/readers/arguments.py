"""Megatron's arguments, as its checkpoints carry them."""

from collections.abc import Mapping
from typing import Any

from lingconv.containers.pickles import Record


def args_of(state: Any) -> Mapping[str, Any]:
    """Return the arguments in a state that Megatron saved, whatever class they are of."""
    args = state.get("args") if isinstance(state, dict) else None
    values = args.state if isinstance(args, Record) else args
    return values if isinstance(values, dict) else {}
