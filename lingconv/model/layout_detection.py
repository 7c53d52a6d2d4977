"""Detection of a checkpoint's layout by the names of its tensors.

No I/O: names in, the layout's name out.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet

from lingconv.model.family import Family
from lingconv.model.layout import Layout

# Suffix of a layout whose MTP layers have the base's names, while all other names are refined.
MTP_APART = "mtp_apart"


def refined(family: Family, base: str, names: Collection[str]) -> str:
    """Return the layout `base` with all of its refinements that occur in `names`."""
    known = {_template(name) for name in names}
    found = [
        word
        for word in _words(family, base)
        if any(own in known and usual not in known for usual, own in _renamed(family, base, word))
    ]
    return "+".join([base, *found])


def experts_layout(family: Family, base: str, names: Collection[str]) -> str:
    """Return the layout `base`, or its refinement with stacked experts that fits most `names`."""
    known = {_template(name) for name in names}
    scores = {
        word: sum(own in known for _, own in _renamed(family, base, word)) for word in family.merged
    }
    best = max(scores, key=lambda word: scores[word], default="")
    return f"{base}+{best}" if best and scores[best] else base


def with_mtp_apart(layout: Layout, plain: Layout, names: AbstractSet[str]) -> Layout:
    """Return `layout`, with the MTP layers of `plain` if `names` has those and not its own.

    dFactory's tool merges the experts of the decoder and leaves MTP layers as they are.
    """
    own, usual = _mtp_names(layout), _mtp_names(plain)
    if own == usual or names & (own - usual) or not names & (usual - own):
        return layout
    tensors = {name: tensor for name, tensor in layout.tensors.items() if not tensor.mtp}
    tensors |= {name: tensor for name, tensor in plain.tensors.items() if tensor.mtp}
    return Layout(f"{layout.name}+{MTP_APART}", tensors)


def _mtp_names(layout: Layout) -> set[str]:
    return {name for name, tensor in layout.tensors.items() if tensor.mtp}


def _words(family: Family, base: str) -> list[str]:
    """Return the refinements of a layout, in the order of the family file."""
    columns: list[Mapping[str, str]] = [block.addresses for block in family.blocks]
    columns += [rule.addresses for group in family.tensors.values() for rule in group]
    keys = dict.fromkeys(key for addresses in columns for key in addresses)
    return [key.removeprefix(f"{base}_") for key in keys if key.startswith(f"{base}_")]


def _renamed(family: Family, base: str, word: str) -> Iterator[tuple[str, str]]:
    """Yield the templates of tensors that a refinement renames: (name in base, own name)."""
    layout = f"{base}+{word}"
    for block in family.blocks:
        for rule in (rule for group in block.groups for rule in family.tensors[group]):
            usual = _template(block.address(base) + rule.address(base))
            own = _template(block.address(layout) + rule.address(layout))
            if own != usual:
                yield usual, own


def _template(text: str) -> str:
    """Return a name or an address with its numbers replaced by `#`."""
    return re.sub(r"\{\w+\}|\d+", "#", text)
