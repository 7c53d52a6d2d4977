"""Symbols: the numbers, switches and words of a model, and where each layout keeps them."""

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lingconv.errors import CheckpointError
from lingconv.errors.value_kinds import Field, Kind, shown, what_is_wrong
from lingconv.model.symbol_rules import AS_IT_IS, RULES, Spelling

# GGUF, torch and llama.cpp count in 32 bits, with a sign; float32 begins and ends here.
MAX_COUNT = (1 << 31) - 1
MAX_NUMBER = 3.4e38
MIN_NUMBER = 1.2e-38
MAX_WORD = 100
_TYPES = {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT, str: Kind.TEXT}


class SymbolError(ValueError):
    """A value that no model has: under `key` of a config, and what is wrong with it."""

    def __init__(self, key: str, wrong: str, value: Any = None) -> None:
        super().__init__(f"`{key}` {wrong}")
        self.key = key
        self.value = value


@dataclass(frozen=True, slots=True)
class Symbol:
    """A number, switch or word of the model and where each layout keeps it: the first key wins.

    `spellings` say how a layout writes the value; `presence` is a glob of tensor names in a layout
    that keeps no key for a switch, and what the switch is where there is such a tensor. The value
    is a `kind` from `least` to `most`, no more than the symbol `at_most`, of which it is a whole
    part where it `divides` one. Where `said`, a config that has no key for it is told of.
    """

    name: str
    keys: Mapping[str, tuple[str, ...]]
    default: Any
    rule: str
    spellings: Mapping[str, Spelling]
    presence: Mapping[str, tuple[str, bool]]
    least: float = 0
    most: float | None = None
    at_most: str = ""
    divides: str = ""
    said: bool = False

    @property
    def kind(self) -> Kind:
        """What the value is: said by the rule, else by the default; a size where neither says."""
        if self.rule:
            return RULES[self.rule].gives
        return _TYPES.get(type(self.default), Kind.INT)

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
        spelling = self.spellings.get(layout, AS_IT_IS)
        own = self._own(config, layout, spelling)
        if own is not None:
            own = spelling.read(own, symbols)
        if self.rule:
            return RULES[self.rule].value(own, symbols)
        if own is None and self.default is None:
            raise KeyError(self.key(layout))
        return self.default if own is None else own

    def _own(self, config: Mapping[str, Any], layout: str, spelling: Spelling) -> Any:
        """Return what stands under the first key that there is; raise SymbolError for odd kinds."""
        for key in self.keys.get(layout, ()):
            value = look_up(config, key)
            if value is not None:
                kinds = spelling.stored or (RULES[self.rule].takes if self.rule else (self.kind,))
                if wrong := what_is_wrong(value, Field(kinds, items=(Kind.INT,))):
                    raise SymbolError(key, wrong, value)
                return value
        return None

    def check(self, value: Any, symbols: Mapping[str, Any]) -> str:
        """Return what is wrong with a value for this symbol; empty for a good one."""
        most = self.most or (MAX_COUNT if self.kind == Kind.INT else MAX_NUMBER)
        if wrong := what_is_wrong(value, Field((self.kind,), least=self.least, most=most)):
            return wrong
        if self.kind == Kind.TEXT:
            return "" if len(value) <= MAX_WORD and value.isprintable() else f"is {shown(value)}"
        if self.kind == Kind.FLOAT and 0 < value < MIN_NUMBER:
            return f"is {value!r}, which is 0 in float32"
        limit = symbols.get(self.at_most, 0)
        if limit and value > limit:
            return f"is {value:,}, more than the {limit:,} of `{self.at_most}`"
        whole = symbols.get(self.divides, 0)
        return f"is {value:,}, no whole part of {whole:,}" if whole and whole % value else ""

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
    path = ""
    for part in key.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise SymbolError(path, f"is {shown(value)}, not {Kind.OBJECT}")
        path = f"{path}.{part}" if path else part
        value = value.get(part)
    return value


def whole_number(value: str | int, symbols: Mapping[str, Any]) -> int:
    """Return a number, or that of a symbol; raise CheckpointError when it is none."""
    number = value if isinstance(value, int) else symbols[value]
    if not isinstance(number, int):
        raise CheckpointError(f"config.json gives `{value}` as {shown(number)}, not a whole number")
    return number
