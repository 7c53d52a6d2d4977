"""The forward pass of a model: embeddings, layers, head, MTP; one layer's weights at a time.

While a layer is computed, the next one's attention and shared weights are prefetched; experts are
read as soon as the router has chosen them, and only those.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors.torch import save
from torch import Tensor

from lingconv.checkpoint.recognised_checkpoint import Model, refuse_faults
from lingconv.errors import MATHEMATICS, CheckpointError, Fault, UsageError
from lingconv.model.family import LogicalName
from lingconv.storage.local_files import replace_file
from lingconv.storage.local_output import explained_writing
from lingconv.storage.machine import num_processors
from lingconv.verification.options import Activations, Compute, ForwardOptions
from lingconv.verification.progress import Unwatched, Watcher
from lingconv.verification.reference import ling2
from lingconv.verification.reference.ling2 import Rope, Routing
from lingconv.verification.reference.weights import WeightStream

_DTYPES = {Compute.F32: torch.float32, Compute.BF16: torch.bfloat16}
# Matrices in the order in which ling2.py uses them, before the experts.
_ATTENTION = ("q", "k", "v", "o")
_DENSE = ("gate", "up", "down")
_MOE = ("router", "shared.gate", "shared.up", "shared.down")
_MTP_INPUT = ("eh_proj",)
_EXPERT = ("gate", "up", "down")


class Step(NamedTuple):
    """The output of one stage of the model: `embedding`, `layers.0`, ..., `mtp.0`, ...

    `hidden_BSH` of the last layer is taken after the final norm, as Hugging Face does.
    """

    name: str
    hidden_BSH: Tensor
    routing: Routing | None


@dataclass(frozen=True, slots=True)
class Trace:
    """All outputs of a forward pass, and its duration.

    `tensors`: `input_ids` [B, S]; `logits` [B, S, V] and `mtp_logits.i`, float32; `hidden_states.i`
    [B, S, H] (0 is the embedding, then one for each layer); `router_logits.i` [B, S, E] and
    `router_topk.i` [B, S, A] for each MoE layer, those of MTP included.
    `waited_s` is the part of `seconds` in which the computation waited for weights.
    """

    tensors: dict[str, Tensor]
    seconds: float
    waited_s: float
    bytes_read: int

    def save(self, path: Path) -> None:
        """Store all tensors in a .safetensors file, under their names."""
        stored = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        with explained_writing(path):
            replace_file(path, [save(stored)])


class LayerWeights:
    """The weights of one layer; the names in `then` are prefetched after this layer's."""

    def __init__(self, stream: WeightStream, prefix: str, then: Iterable[LogicalName]) -> None:
        self._stream = stream
        self._prefix = prefix
        self._then = list(then)
        if "router" not in self:
            stream.ask(self._then)

    def __contains__(self, name: str) -> bool:
        return self._stream.has(self._name(name))

    def __getitem__(self, name: str) -> Tensor:
        return self._stream.small(self._name(name))

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Return x W^T, plus the bias if there is one."""
        product = self._stream.linear(self._name(name), x)
        bias = f"{name}_bias"
        return product + self[bias].to(product.dtype) if bias in self else product

    def choose(self, experts: Iterable[int]) -> None:
        """Queue the reading of these experts, and then of the next layer."""
        self._stream.ask(
            self._name(f"experts.{expert}.{part}") for expert in experts for part in _EXPERT
        )
        self._stream.ask(self._then)

    def _name(self, name: str) -> LogicalName:
        return LogicalName(self._prefix + name)


class ForwardPass:
    """One forward pass over `ids_BS`: iterate over `steps()`, then call `logits()`.

    `pinned` maps a step's name to the experts [B, S, A] that its router must take.
    Raises CheckpointError for a broken checkpoint and for NaN, with the layer's name, and
    UsageError for ids without an embedding.
    """

    def __init__(
        self,
        model: Model,
        ids_BS: Tensor,
        options: ForwardOptions | None = None,
        pinned: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.options = options or ForwardOptions()
        self.options.check()
        check_device(self.options.device)
        check_model(model, mtp=self.options.mtp)
        check_ids(ids_BS, model.symbols["vocab_size"])
        self._uri = model.checkpoint.storage.uri
        self._config = model.symbols
        self._ids_BS = ids_BS
        self._pinned = pinned if pinned is not None else {}
        self._outputs: list[Tensor] = []
        self._dtype = _DTYPES[Compute(self.options.compute)]
        self._device = self.options.device
        self.stream = WeightStream(
            model,
            compute=self._dtype,
            device=self._device,
            fp8_activations=self.options.activations == Activations.FP8,
        )

    def __enter__(self) -> Self:
        # Half of the CPUs compute, the others are for the readers: OpenMP's threads spin while they
        # wait, and would take CPU time from reading.
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(max(1, num_processors() // 2))
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._threads_before)
        self.stream.__exit__(*error)

    @torch.inference_mode()
    def steps(self) -> Iterator[Step]:
        """Yield the output of each stage, in order."""
        config = self._config
        layers = [f"layers.{number}." for number in range(config["layers"])]
        mtp = [f"mtp.{i}." for i in range(config["mtp_layers"] if self.options.mtp else 0)]
        prefixes = [*layers, *mtp]
        rope = ling2.rope(self._ids_BS.shape[1], config, self._dtype, self._device)
        self.stream.ask(self._matrices(prefixes[0]))
        ids_BS = self._ids_BS
        x_BSH = self._embed(ids_BS)
        yield Step("embedding", x_BSH, None)
        for number, prefix in enumerate(prefixes):
            then = prefixes[number + 1] if number + 1 < len(prefixes) else None
            w = LayerWeights(self.stream, prefix, self._matrices(then))
            if prefix in mtp:
                ids_BS = ling2.next_ids(ids_BS)
                x_BSH = ling2.mtp_input(self._embed(ids_BS), x_BSH, w, config)
            x_BSH, routing = self._layer(prefix, x_BSH, w, rope)
            if prefix in mtp:
                x_BSH = ling2.rms_norm(x_BSH, w["final_norm"], config["rms_norm_eps"])
            elif prefix == layers[-1]:
                norm = self.stream.small(LogicalName("norm"))
                x_BSH = ling2.rms_norm(x_BSH, norm, config["rms_norm_eps"])
            if prefix in mtp or prefix == layers[-1]:
                self._outputs.append(x_BSH)
            self._check_finite(prefix, x_BSH)
            yield Step(prefix.removesuffix("."), x_BSH, routing)

    @torch.inference_mode()
    def logits(self) -> list[Tensor]:
        """Return float32 logits [B, S, V]: the model's own, then those of each MTP layer."""
        return [logits.float() for logits in self._head(torch.stack(self._outputs)).unbind()]

    def _layer(
        self, prefix: str, x_BSH: Tensor, w: LayerWeights, rope: Rope
    ) -> tuple[Tensor, Routing | None]:
        pinned = self._pinned.get(prefix.removesuffix("."))
        return ling2.decoder_layer(x_BSH, w, rope, self._config, pinned)

    def _embed(self, ids_BS: Tensor) -> Tensor:
        return self.stream.rows(LogicalName("embedding"), ids_BS)

    def _head(self, x: Tensor) -> Tensor:
        return self.stream.linear(self._head_name, x)

    @property
    def _head_name(self) -> LogicalName:
        return LogicalName("head" if self._config["own_head"] else "embedding")

    def _matrices(self, prefix: str | None) -> list[LogicalName]:
        """Return the matrices that a layer uses before its experts; None stands for the head."""
        if prefix is None:
            return [self._head_name]
        names = [LogicalName(prefix + name) for name in (*_MTP_INPUT, *_ATTENTION, *_MOE, *_DENSE)]
        return [name for name in names if self.stream.has(name)]

    def _check_finite(self, prefix: str, x_BSH: Tensor) -> None:
        if not torch.isfinite(x_BSH).all():
            raise CheckpointError(
                f"{self._uri}: NaN or Inf in the activations after {prefix.removesuffix('.')}",
                hint="`lingconv verify --level tensors` against a good copy names the weight",
            )


def mtp_count(model: Model) -> int:
    """Return the number of MTP layers of a model."""
    count: int = model.symbols["mtp_layers"]
    return count


def check_model(model: Model, *, mtp: bool) -> None:
    """Raise CheckpointError for a checkpoint that cannot be run."""

    def excused(fault: Fault) -> bool:
        tensor = model.tensor(fault.tensor)
        return not mtp and tensor is not None and tensor.mtp

    refuse_faults(model, excused)
    for stored in model.stored.values():
        if not stored.encoding.is_decodable:
            raise CheckpointError(
                f"{stored.extents[0].file}: {stored.name}: {stored.encoding.label} cannot be"
                " read as numbers"
            )
    odd = [fault for fault in model.faults if fault.kind == MATHEMATICS]
    if odd:
        raise CheckpointError("config.json asks for what is not computed here", faults=odd)
    symbols = model.symbols
    if not symbols["whole"]:
        raise CheckpointError(f"{model.checkpoint.storage.uri} holds MTP layers only, no decoder")
    if symbols["rope_scaling"] not in ("default", "linear", "yarn"):
        raise CheckpointError(
            f"config.json: rope_scaling `{symbols['rope_scaling']}` is not computed here",
            hint="`linear` and `yarn` are, and none at all",
        )
    if symbols["score_function"] not in ("sigmoid", "softmax"):
        raise CheckpointError(f"config.json: score_function `{symbols['score_function']}`?")
    if symbols["experts"] % symbols["expert_groups"]:
        raise CheckpointError(
            f"config.json: {symbols['expert_groups']} groups do not divide"
            f" {symbols['experts']} experts"
        )


def check_device(device: str) -> None:
    """Raise UsageError for a device that torch does not find on this machine."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise UsageError(f"`device={device}` cannot be used: {exc}") from exc


def check_ids(ids_BS: Tensor, vocab_size: int) -> None:
    """Raise UsageError for ids without an embedding."""
    if ids_BS.dim() != 2 or not ids_BS.numel():
        raise UsageError("there are no tokens to run", hint="pass `tokens=1,2,3` or `prompt`")
    low, high = int(ids_BS.min()), int(ids_BS.max())
    if low < 0 or high >= vocab_size:
        wrong = high if high >= vocab_size else low
        raise UsageError(f"token id {wrong} is outside of the vocabulary of {vocab_size:,}")


def trace(
    model: Model,
    ids_BS: Tensor,
    options: ForwardOptions | None = None,
    watcher: Watcher | None = None,
) -> Trace:
    """Return all outputs of one forward pass of a model."""
    watcher = watcher or Unwatched()
    started = time.perf_counter()
    tensors = {"input_ids": ids_BS}
    with ForwardPass(model, ids_BS, options) as run:
        routers = 0
        for number, step in enumerate(run.steps()):
            tensors[f"hidden_states.{number}"] = step.hidden_BSH
            if step.routing is not None:
                tensors[f"router_logits.{routers}"] = step.routing.logits_BSE
                tensors[f"router_topk.{routers}"] = step.routing.topk_BSA.to(torch.int32)
                routers += 1
            watcher.stage(step.name)
        tensors["logits"], *mtp_logits = run.logits()
        tensors |= {f"mtp_logits.{i}": logits for i, logits in enumerate(mtp_logits)}
        watcher.stage("head")
        seconds = time.perf_counter() - started
        return Trace(tensors, seconds, run.stream.waited_s, run.stream.bytes_read)
