"""What the names and shapes of Megatron's tensors say of their model, where nothing else does."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lingconv.containers.stored_tensor import StoredTensor
from lingconv.model.family import Block, Family, TensorRule
from lingconv.model.layout import MEGATRON
from lingconv.model.layout_detection import refined
from lingconv.model.symbol_rules import symbols_from_sizes

_INDEX = re.compile(r"\{\w+\}")


def symbols_from_shapes(family: Family, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return the symbols that follow from the tensors of torch_dist: sizes, counts and switches."""
    layout = refined(family, MEGATRON, tensors)
    found: dict[str, Any] = dict(_counts(family, layout, tensors))
    addressed = list(_addressed(family, layout, tensors))
    for _ in range(len(addressed)):  # every round solves one more symbol, or none any more
        known = len(found)
        for rules, shape in addressed:
            _solve(rules, shape, found)
        if len(found) == known:
            break
    held = {id(rule) for rules, _ in addressed for rule in rules}
    present: dict[str, bool] = {}
    for rule in (rule for group in family.tensors.values() for rule in group if rule.when):
        present[rule.when] = present.get(rule.when, False) or id(rule) in held
    return symbols_from_sizes(found, present)


def _pattern(address: str) -> re.Pattern[str]:
    return re.compile(r"([0-9]{1,6})".join(map(re.escape, _INDEX.split(address))))


def _blocks(family: Family, layout: str) -> Iterator[tuple[Block, TensorRule, re.Pattern[str]]]:
    for block in family.blocks:
        for rule in (rule for group in block.groups for rule in family.tensors[group]):
            yield block, rule, _pattern(block.address(layout) + rule.address(layout))


def _counts(
    family: Family, layout: str, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, int]]:
    """Yield the numbers of layers: a kind of layer is where all tensors are that only it has."""
    totals = {"layers": 0, "dense_layers": 0, "mtp_layers": 0}
    numbers: dict[int, set[int]] = {}
    for block, rule, pattern in _blocks(family, layout):
        prefix = block.address(layout)
        others = [each for each in family.blocks if each is not block]
        alike = [each.groups for each in others if each.address(layout) == prefix]
        if "{" not in prefix or rule.when or any(rule.group in groups for groups in alike):
            continue
        found = {int(match[1]) for name in tensors if (match := pattern.fullmatch(name))}
        held = numbers.setdefault(id(block), found)
        held &= found
        key = "mtp_layers" if block.mtp else str(block.end)
        totals[key] = max(held, default=-1) + 1
    totals["layers"] = max(totals["layers"], totals["dense_layers"])
    yield from totals.items()


def _addressed(
    family: Family, layout: str, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[list[TensorRule], tuple[int, ...]]]:
    """Yield the rules that share an address, with the shape of a tensor there."""
    shared: dict[str, dict[str, TensorRule]] = {}
    for block, rule, _ in _blocks(family, layout):
        shared.setdefault(block.address(layout) + rule.address(layout), {})[rule.name] = rule
    for address, by_name in shared.items():
        rules = list(by_name.values())
        pattern = _pattern(address)
        shape = next((t.shape for name, t in tensors.items() if pattern.fullmatch(name)), None)
        if shape is not None:
            yield rules, shape


def _solve(rules: list[TensorRule], shape: tuple[int, ...], found: dict[str, Any]) -> None:
    """Find the one symbol of an axis that is not known yet, if there is only one."""
    stacked = len(shape) - len(rules[0].axes)
    if stacked:
        if stacked != 1 or len(rules[0].repeat) != 1:
            return  # no tensor of the model: its shape says nothing
        ((_, count),) = rules[0].repeat
        found.setdefault(count, shape[0])
    for axis, size in enumerate(shape[stacked:]):
        terms = [rule.axes[axis] for rule in (rules if axis == 0 else rules[:1])]
        unknown = {word for term in terms for word in term if _value(word, found) is None}
        if len(unknown) != 1:
            continue
        (symbol,) = unknown
        fixed = factor = 0
        for term in terms:
            product = 1
            for word in term:
                product *= _value(word, found) or 1
            fixed, factor = (
                (fixed, factor + product) if symbol in term else (fixed + product, factor)
            )
        if factor and (size - fixed) % factor == 0:
            found[str(symbol)] = (size - fixed) // factor


def _value(word: str | int, found: Mapping[str, Any]) -> int | None:
    return word if isinstance(word, int) else found.get(word)
