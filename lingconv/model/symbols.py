"""Symbols: the numbers and switches of a model, and where each layout keeps them."""

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lingconv.errors import CheckpointError
from lingconv.model.symbol_rules import AS_IT_IS, RULES, Spelling

# No dimension of a real model comes near; it keeps a hostile config from exhausting memory.
MAX_SYMBOL = 1 << 32


@dataclass(frozen=True, slots=True)
class Symbol:
    """A number or switch of the model and where each layout keeps it: the first key wins.

    `spellings` say how a layout writes the value; `presence` is a glob of tensor names in a layout
    that keeps no key for a switch, and what the switch is where there is such a tensor.
    """

    name: str
    keys: Mapping[str, tuple[str, ...]]
    default: Any
    rule: str
    spellings: Mapping[str, Spelling]
    presence: Mapping[str, tuple[str, bool]]

    def key(self, layout: str) -> str:
        """Return the key that a layout uses first, or the symbol's name where it has none."""
        return self.keys.get(layout, (self.name,))[0]

    def value(
        self,
        config: Mapping[str, Any],
        layout: str,
        symbols: Mapping[str, Any],
        names: Collection[str],
    ) -> Any:
        """Read the symbol from a config; raise KeyError when it is required and missing.

        `names` are the tensors that the checkpoint has.
        """
        if layout in self.presence:
            pattern, value = self.presence[layout]
            return value if fnmatch.filter(names, pattern) else not value
        found = (look_up(config, key) for key in self.keys.get(layout, ()))
        own = next((value for value in found if value is not None), None)
        if own is not None:
            own = self.spellings.get(layout, AS_IT_IS).read(own, symbols)
        if self.rule:
            return RULES[self.rule](own, symbols)
        if own is None and self.default is None:
            raise KeyError(self.key(layout))
        return self.default if own is None else own

    def written(self, layout: str, symbols: Mapping[str, Any]) -> Any:
        """Return what a layout writes for the symbol, or None when it leaves it out."""
        if layout not in self.keys:
            return None
        return self.spellings.get(layout, AS_IT_IS).write(symbols[self.name], symbols)


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """Return the value under `key`, whose dots lead into nested objects, or None."""
    if key in config:
        return config[key]
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def whole_number(value: str | int, symbols: Mapping[str, Any]) -> int:
    """Return a number, or that of a symbol; raise CheckpointError when it is none."""
    number = value if isinstance(value, int) else symbols[value]
    if not isinstance(number, int):
        raise CheckpointError(f"config.json gives `{value}` as {number!r}, not a whole number")
    return number


def check_symbol(value: Any) -> None:
    """Raise ValueError or TypeError for what no symbol of a real model is."""
    if isinstance(value, (int, float)) and not 0 <= value <= MAX_SYMBOL:
        raise ValueError(f"{value} is not a size")
    if not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is neither a number, a switch nor a word")
