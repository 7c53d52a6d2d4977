"""Groups of options that several commands share: dataclasses, spread out for Typer."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take whole groups of options.

    A parameter whose type is a dataclass stands for an option for each of its fields, which may be
    groups themselves; the command gets them put together again.
    """
    kinds = get_type_hints(command, include_extras=True)
    kinds.pop("return", None)
    options = [
        option
        for parameter in inspect.signature(command).parameters.values()
        for option in _spread(parameter.name, kinds[parameter.name], parameter.default)
    ]

    @wraps(command)
    def spread(**words: Any) -> None:
        command(
            **{name: _gather(name, kind, words) for name, kind in kinds.items() if name != "return"}
        )

    spread.__dict__["__signature__"] = inspect.Signature(options)
    spread.__annotations__ = {}
    return spread


def _spread(name: str, kind: Any, default: Any) -> Iterator[inspect.Parameter]:
    """Yield the options that a parameter stands for."""
    if not is_dataclass(kind):
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
        )
        return
    kinds = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        yield from _spread(field.name, kinds[field.name], field.default)


def _gather(name: str, kind: Any, words: dict[str, Any]) -> Any:
    """Return the value of a parameter, from those of its options."""
    if not is_dataclass(kind):
        return words[name]
    kinds = get_type_hints(kind)
    make: Any = kind
    return make(
        **{field.name: _gather(field.name, kinds[field.name], words) for field in fields(kind)}
    )
