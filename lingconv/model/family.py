"""Model families: the logical tensors of a model and their addresses, from `formats/*.toml`.

This module has symbols, logical tensors and roles, but no files, bytes or encodings, and no tensor
name of any model: those are data (`formats/README.md`).
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, NamedTuple, NewType

from lingconv.errors import CheckpointError, Fault
from lingconv.model.parallelism import RankShard
from lingconv.model.symbols import Symbol, SymbolError, whole_number

LogicalName = NewType("LogicalName", str)
PhysicalName = NewType("PhysicalName", str)
Shape = tuple[int, ...]

# Bounds of what a config may ask for: a hostile one must not exhaust memory. Ling-1T has 62,000
# tensors, each expert's counted.
MAX_REPEATS = 100_000
MAX_TENSORS = 500_000


class Role(StrEnum):
    """The role of a tensor in the model: decides if it may be quantized, and if it is active."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    LINEAR = "linear"
    EXPERT = "expert"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    MTP_PROJECTION = "mtp_projection"

    @property
    def quantizable(self) -> bool:
        """Whether FP8 dialects store this weight in FP8 by default."""
        return self in (Role.LINEAR, Role.EXPERT)

    @property
    def is_linear_module(self) -> bool:
        """Whether runtimes build an nn.Linear for it: configs must list it if it is not FP8."""
        return self in (
            Role.LINEAR,
            Role.EXPERT,
            Role.ROUTER,
            Role.HEAD,
            Role.MTP_PROJECTION,
        )


class Transposition(StrEnum):
    """How a stack of transposed matrices is stored: [n] matrices of [rows, cols] each.

    Megatron's fused experts are wide or tall, NeMo Automodel's are deep.
    """

    NONE = ""
    WIDE = "wide"  # [cols, n x rows]
    TALL = "tall"  # [n x cols, rows]
    DEEP = "deep"  # [n, cols, rows]


class LogicalTensor(NamedTuple):
    """One tensor of the model at the finest grain, and the physical tensor that holds its rows.

    `stack` is 0, or the number of such tensors that are stacked along a first axis of the physical
    one. Tensors that share the rows of a matrix may be interleaved in `groups`, with an equal part
    of their rows in every group. `transposition` is how a stack is transposed, if it is. Tensors
    with the same `fused`, if it is not empty, are one matrix in runtimes.
    """

    name: LogicalName
    role: Role
    shape: Shape
    address: PhysicalName
    keep_dtype: bool
    mtp: bool
    stack: int
    groups: int
    split: str
    is_expert: bool
    transposition: Transposition
    fused: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """Groups of tensors, repeated for the layers `first` <= layer < `end`."""

    name: str
    addresses: Mapping[str, str]
    groups: tuple[str, ...]
    first: str | int
    end: str | int
    mtp: bool
    stage: str

    def layers(self, symbols: Mapping[str, Any]) -> range:
        """Return the layer numbers that this block covers."""
        layers = range(whole_number(self.first, symbols), whole_number(self.end, symbols))
        if len(layers) > MAX_REPEATS:
            raise CheckpointError(f"config.json asks for {len(layers):,} layers")
        return layers

    def address(self, layout: str) -> str:
        """Return the prefix of the block's addresses in a layout."""
        return _of_layout(self.addresses, layout)

    def numbered(
        self, symbols: Mapping[str, Any], part: RankShard | None
    ) -> Iterator[tuple[int, ...]]:
        """Yield each layer of a shard, as (index in the block, layer, layer in the shard)."""
        if part is not None and self.stage and self.stage not in part.stages:
            return
        for i, layer in enumerate(self.layers(symbols)):
            if part is None or self.stage:
                yield i, layer, layer
            elif layer in part.layers:
                yield i, layer, layer - part.layers.start


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One `[[tensor]]` entry: a logical tensor of a group and its address in every layout."""

    group: str
    name: str
    role: Role
    axes: tuple[tuple[str | int, ...], ...]
    addresses: Mapping[str, str]
    when: str
    repeat: tuple[tuple[str, str], ...]
    keep_dtype: bool
    interleave: Mapping[str, str]
    split: Mapping[str, str]
    transposed: Mapping[str, Transposition]
    fused: str = ""

    def address(self, layout: str) -> str:
        """Return the address in a layout: that of the last refinement that has one."""
        return _of_layout(self.addresses, layout)

    def stack(self, layout: str, symbols: Mapping[str, Any], part: RankShard | None) -> int:
        """Return the number of repeated tensors that share one address (a stack); 0 if none do."""
        for index, count in self.repeat:
            if "{" + index + "}" not in self.address(layout):
                return whole_number(count, symbols) if part is None else len(part.experts)
        return 0

    def transposition(self, layout: str) -> Transposition:
        """Return how a layout stores a stack of transposed matrices."""
        base, *refinements = layout.split("+")
        found = (self.transposed.get(f"{base}_{word}") for word in refinements)
        return next((each for each in found if each), Transposition.NONE)

    def num_groups(self, layout: str, symbols: Mapping[str, Any]) -> int:
        """Return the number of groups in which the rows at one address are interleaved, or 1."""
        base = layout.split("+")[0]
        return whole_number(self.interleave[base], symbols) if base in self.interleave else 1

    def pieces(self, symbols: Mapping[str, Any]) -> int:
        """Return how many tensors of a layer it stands for, in the layout that cuts them most."""
        groups = [whole_number(count, symbols) for count in self.interleave.values()]
        return math.prod(whole_number(n, symbols) for _, n in self.repeat) * max(groups, default=1)

    def shape(self, symbols: Mapping[str, Any]) -> Shape:
        """Return the shape under `symbols`; an axis is a product of symbols and integers."""
        dims = []
        for axis in self.axes:
            size = 1
            for factor in axis:
                size *= whole_number(factor, symbols)
            if size == 0:
                raise CheckpointError(f"config.json makes an axis of `{self.name}` empty")
            dims.append(size)
        return tuple(dims)


@dataclass(frozen=True, slots=True)
class Drop:
    """Physical tensors that no target needs, and the reason."""

    patterns: Mapping[str, re.Pattern[str]]
    reason: str


@dataclass(frozen=True, slots=True)
class ScalePolicy:
    """A named FP8 scale policy: which logical tensors (globs) get power-of-two scales."""

    min_amax: float
    ue8m0: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KnownTokenizer:
    """The family's tokenizer: its pre-tokenizer in llama.cpp (`pre`), and how it is recognised.

    `check` is the SHA-256 of the tokens of llama.cpp's check text; `split` the regular expression
    of tokenizer.json.
    """

    pre: str
    check: str
    control_tokens: tuple[str, ...]
    split: str


@dataclass(frozen=True, slots=True)
class GgufModel:
    """llama.cpp's architecture and tokenizer for models whose config.json says `of`."""

    architecture: str
    of: str
    tokenizer: KnownTokenizer


@dataclass(frozen=True, slots=True)
class MegatronModel:
    """The family's models in Megatron's formats; config.json calls their architecture `of`.

    `args` are the Megatron arguments that follow from the family alone; `state_beside` names
    modules without weights whose state is saved as well, each with the module it is saved beside.
    """

    of: str
    state_beside: Mapping[str, str]
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True, repr=False)
class Family:
    """A model family: its logical tensors with their addresses in every layout.

    `config` has the keys of a rebuilt config.json besides the symbols, `neutral` those that would
    change what is computed, each with the values that do not; `merged` are the refinements
    of Hugging Face's layout that stack experts, each with a description.
    """

    name: str
    title: str
    architectures: Mapping[str, str]
    symbols: tuple[Symbol, ...]
    blocks: tuple[Block, ...]
    tensors: Mapping[str, tuple[TensorRule, ...]]
    drops: tuple[Drop, ...]
    scale_policies: Mapping[str, ScalePolicy]
    config: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]]
    merged: Mapping[str, str]
    gguf: GgufModel | None
    megatron: MegatronModel | None

    def __repr__(self) -> str:
        return f"Family({self.name!r})"

    def resolve(
        self,
        config: Mapping[str, Any],
        layout: str,
        overrides: Mapping[str, Any] | None = None,
        names: Collection[str] = (),
        *,
        file: str = "config.json",
    ) -> dict[str, Any]:
        """Return the value of every symbol under `config`, in the order of the family file.

        `overrides` replace values of the config before later symbols are derived from them; `names`
        are the tensors of the checkpoint; `file` is the config's file, for messages. Raises
        CheckpointError with a list of all keys that are missing or not a usable number.
        """
        overrides = overrides or {}
        symbols: dict[str, Any] = {}
        sound: dict[str, Any] = {}
        faults: list[Fault] = []
        for symbol in self.symbols:
            key = symbol.key(layout)
            try:
                value = overrides.get(symbol.name)
                value = symbol.value(config, layout, symbols, names) if value is None else value
                if wrong := symbol.check(value, sound):
                    raise SymbolError(key, wrong, value)
                symbols[symbol.name] = sound[symbol.name] = value
            except KeyError as exc:
                if exc.args[0] == key:  # else an earlier symbol is missing, and already reported
                    faults.append(Fault("config", f"`{key}` is missing", file))
            except SymbolError as exc:
                symbols[symbol.name] = _stand_in(symbol)
                faults.append(Fault("config", str(exc), file, hint=_way_out(exc, file)))
            except (TypeError, ValueError, ArithmeticError) as exc:
                symbols[symbol.name] = _stand_in(symbol)
                faults.append(Fault("config", f"`{key}` cannot be used: {exc}", file))
        if faults:
            faults = list(dict.fromkeys(faults))  # an object that is none has several symbols
            raise CheckpointError(f"{file} does not describe a {self.title} model", faults=faults)
        self._check_extent(symbols, file)
        return symbols

    def _check_extent(self, symbols: Mapping[str, Any], file: str) -> None:
        """Raise CheckpointError for a model of more tensors, and turns of rows, than there can be.

        Each number of layers and experts may be possible, and their product not.
        """
        count = 0
        for block in self.blocks:
            rules = (rule for group in block.groups for rule in self.tensors[group])
            held = (rule for rule in rules if not rule.when or symbols[rule.when])
            count += len(block.layers(symbols)) * sum(rule.pieces(symbols) for rule in held)
        if count > MAX_TENSORS:
            raise CheckpointError(
                f"{file} asks for {count:,} tensors, more than any model has",
                details=[f"at most {MAX_TENSORS:,}, each expert's counted, are read"],
                hint="look at the numbers of layers, experts and heads",
            )

    def expand(
        self, symbols: Mapping[str, Any], layout: str, part: RankShard | None = None
    ) -> Iterator[LogicalTensor]:
        """Yield every logical tensor of the model, or of a shard, with its address in `layout`.

        The order is the canonical one: layer by layer, each in the order of the family file.
        """
        for block in self.blocks:
            numbered = list(block.numbered(symbols, part))
            entries = self._entries(block, symbols, layout, part) if numbered else []
            prefix = block.address(layout)
            for i, layer, local in numbered:
                name = block.name.format(layer=layer, i=i)
                address = prefix.format(layer=local, i=i)
                for entry in entries:
                    rule = entry.rule
                    yield LogicalTensor(
                        LogicalName(name + entry.name),
                        rule.role,
                        entry.shape,
                        PhysicalName(address + entry.address),
                        rule.keep_dtype,
                        block.mtp,
                        entry.stack,
                        entry.groups,
                        rule.split.get(layout.split("+")[0], ""),
                        bool(rule.repeat),
                        rule.transposition(layout),
                        _sibling(name + entry.name, rule.fused),
                    )

    def _entries(
        self, block: Block, symbols: Mapping[str, Any], layout: str, part: RankShard | None
    ) -> list["_Entry"]:
        """Return the tensors that every layer of a block has.

        Neighbours that repeat over the same index alternate: e0.gate, e0.up, ..., e1.gate, ...
        """
        rules = [
            rule
            for group in block.groups
            for rule in self.tensors[group]
            if not rule.when or symbols[rule.when]
        ]
        entries = []
        for repeat, members in groupby(rules, key=lambda rule: rule.repeat):
            templates = [
                _Entry(
                    rule,
                    rule.shape(symbols),
                    rule.name,
                    rule.address(layout),
                    rule.stack(layout, symbols, part),
                    rule.num_groups(layout, symbols),
                )
                for rule in members
            ]
            for bound, local in _bindings(repeat, symbols, part):
                entries += [
                    entry._replace(
                        name=entry.name.format(**bound), address=entry.address.format(**local)
                    )
                    for entry in templates
                ]
        return entries

    def beyond(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the keys of a config.json that ask for other mathematics, with their values."""
        for key, neutral in self.neutral.items():
            value = config.get(key)
            values = value if isinstance(value, list) else [value]
            if any(each is not None and each not in neutral for each in values):
                yield key, value

    def key(self, symbol: str, layout: str) -> str:
        """Return the config key of a symbol in a layout."""
        base = layout.split("+")[0]
        return next(entry.key(base) for entry in self.symbols if entry.name == symbol)

    def drop_reason(self, name: str, layout: str) -> str | None:
        """Return the reason to leave a physical tensor out, or None if no `[[drop]]` matches it."""
        for drop in self.drops:
            pattern = drop.patterns.get(layout.split("+")[0])
            if pattern is not None and pattern.fullmatch(name):
                return drop.reason
        return None


def _sibling(name: str, word: str) -> str:
    """Return a name with its last part replaced by `word`; empty if there is no word."""
    return f"{name.rpartition('.')[0]}.{word}" if word else ""


def _stand_in(symbol: Symbol) -> Any:
    """Return what later symbols may be derived from in place of a value that cannot be used."""
    return 1 if symbol.default is None else symbol.default


def _way_out(error: SymbolError, file: str) -> str:
    """Return how a number that is written as another kind can be set right, if it is one."""
    if not isinstance(error.value, (str, float)) or file != "config.json" or "." in error.key:
        return ""
    try:
        number = float(error.value)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    text = f"{number:.0f}" if number == int(number) and abs(number) < 1e15 else f"{number!r}"
    return f"write it as a number, or pass `settings={error.key}={text}`"


class _Entry(NamedTuple):
    """A tensor that every layer of a block has; name and address lack the layer's prefix."""

    rule: TensorRule
    shape: Shape
    name: str
    address: str
    stack: int
    groups: int


def _of_layout(addresses: Mapping[str, str], layout: str) -> str:
    """Return the address in a layout; its refinements (`base+one+two`) override its base."""
    base, *refinements = layout.split("+")
    keys = [f"{base}_{word}" for word in reversed(refinements)]
    return next((addresses[key] for key in keys if key in addresses), addresses[base])


def _bindings(
    repeat: tuple[tuple[str, str], ...], symbols: Mapping[str, Any], part: RankShard | None
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Yield the values of a tensor's own index, {expert: 0}, {expert: 1}, ... or {} just once.

    The second value is the index in the shard.
    """
    if not repeat:
        yield {}, {}
        return
    ((index, count),) = repeat
    total = whole_number(count, symbols)
    if total > MAX_REPEATS:
        raise CheckpointError(f"config.json asks for {total:,} tensors of one kind")
    held = range(total) if part is None else part.experts
    yield from (({index: number}, {index: number - held.start}) for number in held)
