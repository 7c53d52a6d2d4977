"""A checkpoint joined with its family: what each stored tensor is, and what does not fit.

`recognise` pairs every physical tensor that the family expects with what is stored, finds the
encodings, and turns every difference into a Fault. Nothing is guessed in silence: `inspect` prints
what was found here.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lingconv.checkpoint import CONFIG_NAME, Checkpoint
from lingconv.containers import StoredTensor
from lingconv.containers.gguf import Metadata
from lingconv.dtypes import DType, GgmlType
from lingconv.encodings import Encoding, Fp8, encoding_of, quantization_config
from lingconv.encodings.fp8 import SCALE_DTYPES, SCALE_SUFFIXES
from lingconv.encodings.fp8 import recognise as recognise_fp8
from lingconv.encodings.quantization_config import Stated
from lingconv.errors import CheckpointError, Fault
from lingconv.family import Family, PhysicalName
from lingconv.layout import Layout, PhysicalTensor, build_layout
from lingconv.metadata.rebuild import plain_values, rebuild_config, rebuild_files
from lingconv.patterns import Pattern
from lingconv.storage.overlay import Overlay
from lingconv.stored import Extent, Locator, Stored

HF = "hf"
GGUF = "gguf"
_WITHOUT_MTP = "the config asks for MTP layers: pass `--mtp drop` to go on without them"


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint that was understood, as far as it could be; `faults` hold the rest."""

    checkpoint: Checkpoint
    family: Family
    architecture: str
    symbols: Mapping[str, Any]
    layout: Layout
    stored: Mapping[PhysicalName, Stored]
    dropped: Mapping[str, str]
    stated: Stated | None
    faults: tuple[Fault, ...]

    def tensor(self, name: str) -> PhysicalTensor | None:
        """Return the physical tensor of this name, or None when the layout has none."""
        return self.layout.tensors.get(PhysicalName(name))

    def locator(self) -> "Locator":
        """Return what finds the rows of logical tensors in this checkpoint."""
        return Locator(self.layout.addresses(), self.stored)


def refuse_faults(model: Model, excused: Callable[[Fault], bool] = lambda fault: False) -> None:
    """Raise CheckpointError with every fatal fault of `model` that is not excused."""
    fatal = [fault for fault in model.faults if fault.fatal and not excused(fault)]
    if fatal:
        plural = "s" if len(fatal) > 1 else ""
        raise CheckpointError(
            f"{model.checkpoint.storage.uri} has {len(fatal)} fault{plural}", faults=fatal
        )


def recognise(checkpoint: Checkpoint, families: Sequence[Family]) -> Model:
    """Find out what a checkpoint is.

    Raises CheckpointError when its config names no known architecture or lacks what describes the
    model; everything less is a fault of the returned Model.
    """
    if checkpoint.metadata is not None:
        return _recognise_gguf(checkpoint, checkpoint.metadata, families)
    family, architecture = _find_family(checkpoint, families)
    symbols = _resolve_symbols(checkpoint, family)
    return _matched(checkpoint, family, architecture, symbols, HF)


def _matched(
    checkpoint: Checkpoint,
    family: Family,
    architecture: str,
    symbols: Mapping[str, Any],
    layout_name: str,
) -> Model:
    layout = build_layout(family, symbols, layout_name)
    matcher = _Matcher(checkpoint, family, layout)
    matcher.match()
    return Model(
        checkpoint=checkpoint,
        family=family,
        architecture=architecture,
        symbols=symbols,
        layout=layout,
        stored=matcher.stored,
        dropped=matcher.dropped,
        stated=matcher.stated,
        faults=(*checkpoint.faults, *matcher.faults),
    )


def _recognise_gguf(
    checkpoint: Checkpoint, metadata: Metadata, families: Sequence[Family]
) -> Model:
    """Recognise a GGUF checkpoint, and show it with the small files that Hugging Face has."""
    values = plain_values(metadata)
    found = values.get("general.architecture")
    known = {family.gguf.architecture: family for family in families if family.gguf}
    family = known.get(found) if isinstance(found, str) else None
    if family is None or family.gguf is None:
        raise CheckpointError(
            f"{checkpoint.storage.uri} has the unknown GGUF architecture {found!r}",
            faults=checkpoint.faults,
            details=[f"known: {name}" for name in known] + [str(f) for f in checkpoint.faults],
            hint="describe the model in a family file and pass it with `--formats PATH`",
        )
    symbols = family.resolve(values, GGUF, names=checkpoint.tensors)
    files, faults = rebuild_files(metadata, family.gguf.tokenizer)
    matrices = [tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 2]
    dtype = matrices[0] if matrices and isinstance(matrices[0], DType) else DType.BF16
    storage = Overlay(checkpoint.storage, list(checkpoint.shards), files)
    shown = replace(
        checkpoint,
        storage=storage,
        config=rebuild_config(family, symbols, metadata, dtype),
        side_files={name: storage.stat(name) for name in files},
        faults=(*checkpoint.faults, *faults),
    )
    return _matched(shown, family, family.gguf.of, symbols, GGUF)


def _find_family(checkpoint: Checkpoint, families: Sequence[Family]) -> tuple[Family, str]:
    named = checkpoint.config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for family in families:
        for name in names:
            if name in family.architectures:
                return family, name
    known = sorted(name for family in families for name in family.architectures)
    close = difflib.get_close_matches(names[0], known, 1) if names else []
    raise CheckpointError(
        f"{CONFIG_NAME} names an unknown architecture: {', '.join(names) or 'none'}",
        faults=checkpoint.faults,
        details=[f"known: {name}" for name in known] + [str(fault) for fault in checkpoint.faults],
        hint=f"did you mean {close[0]}?"
        if close
        else "describe the model in a family file and pass it with `--formats PATH`",
    )


def _resolve_symbols(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    """Read the symbols; find out whether the config counts MTP layers among the hidden layers."""
    symbols = family.resolve(checkpoint.config, HF)
    outside = _first_mtp_tensor(family, symbols)
    if outside is None or outside in checkpoint.tensors:
        return symbols
    decoder_layers = symbols["layers"] - symbols["mtp_layers"]
    if decoder_layers < 0:
        return symbols
    inside_symbols = family.resolve(checkpoint.config, HF, {"layers": decoder_layers})
    inside = _first_mtp_tensor(family, inside_symbols)
    return inside_symbols if inside in checkpoint.tensors else symbols


def _first_mtp_tensor(family: Family, symbols: Mapping[str, Any]) -> PhysicalName | None:
    """Return the name of a tensor that only the first MTP layer has, or None without MTP."""
    for block in family.blocks:
        if block.mtp and len(block.layers(symbols)):
            prefix = block.addresses[HF].format(layer=block.layers(symbols)[0], i=0)
            return PhysicalName(prefix + family.tensors[block.groups[0]][0].addresses[HF])
    return None


class _Matcher:
    """Pairs expected with stored tensors and collects what does not pair."""

    def __init__(self, checkpoint: Checkpoint, family: Family, layout: Layout) -> None:
        self.tensors = checkpoint.tensors
        self.family = family
        self.layout = layout
        self.faults: list[Fault] = []
        self.stored: dict[PhysicalName, Stored] = {}
        self.dropped: dict[str, str] = {}
        self.used: set[str] = set()
        self.stated = self._read_stated(checkpoint.config)
        self.described_in = "config.json" if layout.name == HF else "its metadata"
        self.has_mtp = any(t.mtp and t.name in self.tensors for t in layout.tensors.values())
        self.block = self.stated.block if self.stated else quantization_config.DEFAULT_BLOCK

    def match(self) -> None:
        for tensor in self.layout.tensors.values():
            found = self._find(tensor)
            if found is not None:
                self.stored[tensor.name] = found
        self._sort_rest()
        self._check_stated()

    def _read_stated(self, config: Mapping[str, Any]) -> Stated | None:
        try:
            return quantization_config.read(config)
        except ValueError as exc:
            self.faults.append(Fault("quantization config", str(exc), CONFIG_NAME))
            return None

    def _find(self, tensor: PhysicalTensor) -> Stored | None:
        held = self.tensors.get(tensor.name)
        if held is None:
            message = f"is missing, expected {list(tensor.stored_shape)}"
            hint = _WITHOUT_MTP if tensor.mtp and not self.has_mtp else ""
            self.faults.append(Fault("missing tensor", message, tensor=tensor.name, hint=hint))
            return None
        self.used.add(held.name)
        if held.shape != tensor.stored_shape:
            wanted = f"{self.described_in} calls for {list(tensor.stored_shape)}"
            self._fault("shape", f"has shape {list(held.shape)}, {wanted}", held)
            return None
        if held.dtype == DType.F8_E4M3:
            return self._find_fp8(tensor, held)
        encoding = encoding_of(held.dtype)
        return Stored(tensor.name, tensor.shape, encoding, (_extent(held),), tensor.stack)

    def _find_fp8(self, tensor: PhysicalTensor, held: StoredTensor) -> Stored | None:
        names = [held.name + suffix for suffix in SCALE_SUFFIXES]
        scales = [self.tensors[name] for name in names if name in self.tensors]
        self.used.update(scale.name for scale in scales)
        if len(scales) != 1:
            message = "FP8 weight has two scales" if scales else "FP8 weight without its scale"
            self._fault("scale", f"{message} ({' or '.join(names)})", held)
            return None
        scale = scales[0]
        if isinstance(scale.dtype, GgmlType) or (
            scale.dtype not in SCALE_DTYPES or len(held.shape) != 2
        ):
            message = f"{scale.dtype} scale of an FP8 tensor of {len(held.shape)} axes is not read"
            self._fault("scale", message, scale)
            return None
        encoding = recognise_fp8(
            held.shape,
            scale.name.removeprefix(held.name),
            scale.dtype,
            scale.shape,
            self.block,
            power_of_two=self.stated is not None and self.stated.power_of_two,
        )
        if encoding is None or self._contradicts(encoding):
            block = " x ".join(str(size or "all") for size in self.block)
            message = f"scale has shape {list(scale.shape)}; weight {list(held.shape)} in blocks of"
            self._fault("scale", f"{message} {block} needs another", scale)
            return None
        return Stored(tensor.name, held.shape, encoding, (_extent(held), _extent(scale)))

    def _contradicts(self, encoding: Fp8) -> bool:
        """Whether the config states another block."""
        return self.stated is not None and (encoding.block_rows, encoding.block_cols) != self.block

    def _sort_rest(self) -> None:
        """Classify the stored tensors that nothing in the model asks for."""
        for name in sorted(self.tensors.keys() - self.used):
            held = self.tensors[name]
            reason = self.family.drop_reason(name, self.layout.name)
            owner = _scale_owner(name)
            if reason is not None:
                self.dropped[name] = reason
            elif owner is not None:
                there = owner in self.tensors
                message = "scale of a weight that is " + (
                    f"{self.tensors[owner].dtype}, not FP8" if there else "not there"
                )
                self._fault("scale", message, held)
            else:
                message = f"is no tensor of {self.family.title} by {self.described_in}"
                hint = "pass `--drop PATTERN` to leave tensors out knowingly"
                self._fault("extra tensor", message, held, hint=hint)

    def _check_stated(self) -> None:
        """Compare config.json's word with the tensors: FP8 or not, and which dtype."""
        fp8 = [item.name for item in self.stored.values() if isinstance(item.encoding, Fp8)]
        if fp8 and self.stated is None and not self.faults:
            message = f"has no `{quantization_config.KEY}`, but {len(fp8)} weights are FP8"
            self.faults.append(Fault("quantization config", message, CONFIG_NAME, fatal=False))
        if self.stated and not fp8:
            message = f"has a `{quantization_config.KEY}`, but no weight is FP8"
            self.faults.append(Fault("quantization config", message, CONFIG_NAME, fatal=False))
        kept = [Pattern(text) for text in (self.stated.kept_modules if self.stated else ())]
        if self.layout.name == HF:  # GGUF mixes types by its nature
            self.faults += _odd_dtypes(self.layout, self.stored, kept)

    def _fault(self, kind: str, message: str, held: StoredTensor, hint: str = "") -> None:
        self.faults.append(Fault(kind, message, held.file, held.name, hint=hint))


def _odd_dtypes(
    layout: Layout, stored: Mapping[PhysicalName, Stored], kept: Sequence[Pattern]
) -> Iterable[Fault]:
    """Report tensors whose dtype differs from that of most of their role, unannounced by `kept`."""
    by_role: dict[str, dict[Encoding, list[str]]] = {}
    for name, item in stored.items():
        found = by_role.setdefault(layout.tensors[name].role, {})
        found.setdefault(item.encoding, []).append(name)
    for role, found in by_role.items():
        if len(found) == 1:
            continue
        unannounced = {
            encoding: [name for name in names if not any(p.matches(name) for p in kept)]
            for encoding, names in found.items()
        }
        usual = max(unannounced, key=lambda encoding: len(unannounced[encoding]))
        for encoding, names in unannounced.items():
            if encoding != usual and names:
                rest = f"{len(unannounced[usual])} are {usual.label}"
                message = f"{len(names)} {role} tensors are {encoding.label}, {rest}"
                yield Fault("dtype", message, tensor=names[0], fatal=False)


def _scale_owner(name: str) -> str | None:
    for suffix in SCALE_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def _extent(held: StoredTensor) -> Extent:
    return Extent(held.file, held.offset, held.nbytes)
