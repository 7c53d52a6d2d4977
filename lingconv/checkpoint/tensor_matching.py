"""Matching of the tensors that a layout expects with the stored ones, and their encodings."""

from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Any

from lingconv.checkpoint.chunk_bands import Gap, stored_in_boxes, with_bands
from lingconv.checkpoint.leftover_tensors import sort_leftovers
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.stored_tensor import StoredTensor
from lingconv.encodings import Encoding, Fp8, encoding_of, four_bits, quantization_config
from lingconv.encodings.dtypes import DType
from lingconv.encodings.fp8 import SCALE_DTYPES, SCALE_SUFFIXES
from lingconv.encodings.fp8 import recognise as recognise_fp8
from lingconv.encodings.name_pattern import select
from lingconv.encodings.quantization_config import StatedQuantization
from lingconv.errors import Fault
from lingconv.model.family import Family, PhysicalName, Role
from lingconv.model.layout import GGUF, HF, MEGATRON, Layout, PhysicalTensor
from lingconv.plans.tensor_map import ByteRange, StoredMatrix
from lingconv.storage.file_names import CONFIG_NAME

_WITHOUT_MTP = "the config asks for MTP layers: pass `mtp=drop` to go on without them"


class Matcher:
    """Matches expected with stored tensors; mismatches are collected in `faults`."""

    def __init__(self, checkpoint: Checkpoint, family: Family, layout: Layout) -> None:
        self.checkpoint = checkpoint
        self.tensors = checkpoint.tensors
        self.absent = checkpoint.absent
        self.has_unread = checkpoint.has_unread
        self.is_faulty = any(fault.fatal for fault in checkpoint.faults)
        self.family = family
        self.layout = layout
        self.faults: list[Fault] = []
        self.stored: dict[PhysicalName, StoredMatrix] = {}
        self.dropped: dict[str, str] = {}
        self.used: set[str] = set()
        self._beside = {
            name: four_bits.Found(held.dtype, held.shape) for name, held in self.tensors.items()
        }
        self.stated = self._read_stated(checkpoint.config)
        self.described_in = "config.json" if layout.name != GGUF else "its metadata"
        self.has_mtp = any(
            t.mtp and not self.tensors.keys().isdisjoint((t.name, f"{t.name}_packed"))
            for t in layout.tensors.values()
        )
        self.block = self.stated.block if self.stated else quantization_config.DEFAULT_BLOCK

    def match(self) -> None:
        """Fill `stored`, `dropped` and `faults`."""
        for tensor in self.layout.tensors.values():
            found = self._find(tensor)
            if found is not None:
                self.stored[tensor.name] = found
        rest = sort_leftovers(self.checkpoint, self.family, self.layout, self.used, self._is_told)
        self.dropped.update(rest.dropped)
        self.faults += rest.faults
        self._check_stated()

    def _read_stated(self, config: Mapping[str, Any]) -> StatedQuantization | None:
        try:
            return quantization_config.read(config)
        except ValueError as exc:
            self.faults.append(Fault("quantization config", str(exc), CONFIG_NAME))
            return None

    def _find(self, tensor: PhysicalTensor) -> StoredMatrix | None:
        packed = self._recognise_four_bits(tensor)
        if packed is not None:
            return self._find_four_bits(tensor, packed)
        held = self.tensors.get(tensor.name)
        if held is None:
            self._fault_missing(tensor)
            return None
        self.used.add(held.name)
        if self._is_padded(tensor, held):
            message = f"{held.shape[0] - tensor.shape[0]:,} rows of padding are left out"
            self.faults.append(Fault("padding", message, held.file, held.name, fatal=False))
        elif held.shape != tensor.stored_shape:
            wanted = f"{self.described_in} calls for {list(tensor.stored_shape)}"
            self._fault("shape", f"has shape {list(held.shape)}, {wanted}", held)
            return None
        if held.dtype == DType.F8_E4M3:
            return self._find_fp8(tensor, held)
        encoding = encoding_of(held.dtype)
        if self.layout.base == MEGATRON:
            return self._find_boxes(tensor, held, encoding)
        found = StoredMatrix(tensor.name, tensor.shape, encoding, (_extent(held),), tensor.stack)
        if tensor.transposition:
            return found._replace(pitch=tensor.height, stored_as=tensor.stored_shape)
        return found

    def _recognise_four_bits(self, tensor: PhysicalTensor) -> Encoding | None:
        if not tensor.role.quantizable or tensor.stack or len(tensor.shape) != 2:
            return None
        return four_bits.recognise(tensor.name, tensor.shape[1], self._beside)

    def _find_four_bits(self, tensor: PhysicalTensor, encoding: Encoding) -> StoredMatrix | None:
        """Return a matrix of four bits; every one of its tensors has to be there, as it should."""
        places = []
        for spec in encoding.tensors(tensor.name, tensor.shape):
            held = self.tensors.get(spec.name)
            if held is None and self._is_told(spec.name):
                continue
            if held is None:
                what = f"{encoding.label} weight without it, expected {list(spec.shape)}"
                self.faults.append(Fault("scale", what, tensor=spec.name))
                continue
            self.used.add(held.name)
            alike = held.shape == spec.shape or (prod(held.shape) == prod(spec.shape) == 1)
            if not alike or held.dtype != spec.dtype:
                wanted = f"{encoding.label} calls for {spec.dtype} {list(spec.shape)}"
                self._fault("shape", f"is {held.dtype} {list(held.shape)}, {wanted}", held)
                continue
            places.append(_extent(held))
        if len(places) < len(encoding.stored_types):
            return None
        return StoredMatrix(tensor.name, tensor.shape, encoding, tuple(places), tensor.stack)

    def _fault_missing(self, tensor: PhysicalTensor) -> None:
        if self._is_told(tensor.name):
            return
        known = self.absent.get(tensor.name)
        message = f"is missing, expected {list(tensor.stored_shape)}"
        hint = _WITHOUT_MTP if tensor.mtp and not self.has_mtp else ""
        if known is not None:
            message, hint = f"{message}: {known.reason}", known.hint or hint
        self.faults.append(Fault("missing tensor", message, tensor=tensor.name, hint=hint))

    def _is_told(self, name: str) -> bool:
        """Return whether a fault of a file says already why a tensor, or a part, is not there."""
        known = self.absent.get(name)
        return self.is_faulty and (self.has_unread if known is None else known.is_told)

    def _is_padded(self, tensor: PhysicalTensor, held: StoredTensor) -> bool:
        """Return whether a vocabulary is padded, as Megatron does to give ranks equal shares."""
        vocabulary = tensor.role in (Role.EMBEDDING, Role.HEAD)
        longer = held.shape[1:] == tensor.shape[1:] and held.shape[0] > tensor.shape[0]
        return vocabulary and longer and self.layout.base == MEGATRON

    def _find_boxes(
        self, tensor: PhysicalTensor, held: StoredTensor, encoding: Encoding
    ) -> StoredMatrix | None:
        stored, runs = stored_in_boxes(held, encoding)
        try:
            return with_bands(stored._replace(shape=tensor.shape), runs)
        except Gap as exc:
            if not self._is_told(held.name):
                self._fault("missing chunk", str(exc), held)
            return None

    def _find_fp8(self, tensor: PhysicalTensor, held: StoredTensor) -> StoredMatrix | None:
        names = [held.name + suffix for suffix in SCALE_SUFFIXES]
        scales = [self.tensors[name] for name in names if name in self.tensors]
        self.used.update(scale.name for scale in scales)
        if not scales and any(map(self._is_told, names)):
            return None
        if len(scales) != 1:
            message = "FP8 weight has two scales" if scales else "FP8 weight without its scale"
            self._fault("scale", f"{message} ({' or '.join(names)})", held)
            return None
        scale = scales[0]
        axes = 3 if tensor.stack else 2
        dtype = SCALE_DTYPES.get(scale.dtype)
        if dtype is None or len(held.shape) != axes or tensor.transposition:
            how = "transposed " if tensor.transposition else ""
            message = f"{scale.dtype} scale of {how}FP8 with {len(held.shape)} axes is not read"
            self._fault("scale", message, scale)
            return None
        encoding = recognise_fp8(
            held.shape,
            scale.name.removeprefix(held.name),
            dtype,
            scale.shape,
            self.block,
            power_of_two=self.stated is not None and self.stated.power_of_two,
        )
        if encoding is None or self._contradicts(encoding):
            block = " x ".join(str(size or "all") for size in self.block)
            message = f"scale has shape {list(scale.shape)}; weight {list(held.shape)} in blocks of"
            self._fault("scale", f"{message} {block} needs another", scale)
            return None
        places = _extent(held), _extent(scale)
        return StoredMatrix(tensor.name, tensor.shape, encoding, places, tensor.stack)

    def _contradicts(self, encoding: Fp8) -> bool:
        """Return whether the config states another block size."""
        return self.stated is not None and (encoding.block_rows, encoding.block_cols) != self.block

    def _check_stated(self) -> None:
        """Compare config.json with the tensors: FP8 or not, and which dtype."""
        fp8 = [item.name for item in self.stored.values() if item.encoding.has_scales]
        kinds = " and ".join(
            sorted(
                {
                    "FP8" if item.encoding.is_e4m3 else item.encoding.label
                    for item in self.stored.values()
                    if item.encoding.has_scales
                }
            )
        )
        if fp8 and self.stated is None and not self.faults:
            message = f"has no `{quantization_config.KEY}`, but {len(fp8)} weights are {kinds}"
            self.faults.append(Fault("quantization config", message, CONFIG_NAME, fatal=False))
        if self.stated and not fp8 and not self.has_unread:
            message = f"has a `{quantization_config.KEY}`, but no weight is quantized"
            self.faults.append(Fault("quantization config", message, CONFIG_NAME, fatal=False))
        self._check_four_bits()
        if self.layout.base == HF:  # GGUF and Megatron mix dtypes by their nature
            self.faults += _odd_dtypes(self.layout, self.stored, self._kept())

    def _check_four_bits(self) -> None:
        """Compare the encodings of four bits that config.json names with those that are there."""
        if self.stated is None:
            return
        named = {*self.stated.four_bits}
        held = {
            item.encoding.label.removesuffix(" w4a4")
            for item in self.stored.values()
            if item.encoding.has_scales and not item.encoding.is_e4m3
        }
        if held and named != held:
            says = " and ".join(sorted(named)) or "nothing of four bits"
            message = f"`{quantization_config.KEY}` says {says}, weights are {' and '.join(held)}"
            self.faults.append(Fault("quantization config", message, CONFIG_NAME))

    def _kept(self) -> frozenset[str]:
        """Return the names of the tensors that config.json lists as not quantized."""
        if self.stated is None:
            return frozenset()
        kept = select(self.stated.kept_modules, self.stored)
        for fault in kept.faults:
            message = f"`{quantization_config.KEY}`, `{self.stated.kept_key}`: {fault}"
            hint = "list the modules by name there: what it says of others is not looked at"
            self.faults.append(
                Fault("quantization config", message, CONFIG_NAME, fatal=False, hint=hint)
            )
        return kept.names

    def _fault(self, kind: str, message: str, held: StoredTensor, hint: str = "") -> None:
        self.faults.append(Fault(kind, message, held.file, held.name, hint=hint))


def _odd_dtypes(
    layout: Layout, stored: Mapping[PhysicalName, StoredMatrix], kept: Collection[str]
) -> Iterable[Fault]:
    """Yield tensors whose dtype differs from most of their role and that `kept` does not match."""
    by_role: dict[str, dict[Encoding, list[str]]] = {}
    for name, item in stored.items():
        found = by_role.setdefault(layout.tensors[name].role, {})
        found.setdefault(item.encoding, []).append(name)
    for role, found in by_role.items():
        if len(found) == 1:
            continue
        unannounced = {
            encoding: [name for name in names if name not in kept]
            for encoding, names in found.items()
        }
        usual = max(unannounced, key=lambda encoding: len(unannounced[encoding]))
        for encoding, names in unannounced.items():
            if encoding != usual and names:
                rest = f"{len(unannounced[usual])} are {usual.label}"
                message = f"{len(names)} {role} tensors are {encoding.label}, {rest}"
                yield Fault("dtype", message, tensor=names[0], fatal=False)


def _extent(held: StoredTensor) -> ByteRange:
    return ByteRange(held.file, held.offset, held.nbytes)
