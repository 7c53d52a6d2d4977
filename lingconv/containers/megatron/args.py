"""The arguments that Megatron's checkpoints carry, so that `--use-checkpoint-args` works.

Source: `load_args_from_checkpoint` in megatron/training/checkpointing.py of
github.com/NVIDIA/Megatron-LM at core_v0.13.0, and the launch scripts of Ling-V2.
"""

from collections.abc import Mapping
from typing import Any

from lingconv.containers.megatron.pickle_values import MAX_SIZE, TORCH_NAMES, OpaqueObject, shown
from lingconv.containers.megatron.pickles import Global, Instance
from lingconv.encodings.dtypes import DType
from lingconv.model.family import Family, Role
from lingconv.model.layout import MEGATRON, Layout
from lingconv.model.parallelism import Parallel
from lingconv.plans.options import ConvertOptions, ExpertNames, Spec, Target, TargetDType

ITERATION = 1
_DTYPES = {TargetDType.F16: DType.F16, TargetDType.F32: DType.F32}
_STATEFUL = (Role.LINEAR, Role.EXPERT, Role.NORM, Role.MTP_PROJECTION)
_LINEAR = (Role.LINEAR, Role.EXPERT, Role.MTP_PROJECTION, Role.HEAD)
VOCABULARY = "padded_vocab_size"
_MAX_TEXT, _MAX_ITEMS = 4_096, 10_000  # of an argument that is taken as it is
_DTYPE_KEY = "params_dtype"


def megatron_args(
    family: Family, symbols: Mapping[str, Any], options: ConvertOptions
) -> dict[str, Any]:
    """Return the arguments as JSON values; `params_dtype` is torch's name of a dtype."""
    dtype = _DTYPES.get(TargetDType(options.dtype), DType.BF16) if options.dtype else DType.BF16
    args: dict[str, Any] = dict(family.megatron.args) if family.megatron else {}
    for symbol in family.symbols:
        value = symbol.written(MEGATRON, symbols)
        if value is not None:
            args[symbol.key(MEGATRON)] = value
    if options.layout == Target.RANKS:
        multiple = args.get("make_vocab_size_divisible_by", 1)
        args[VOCABULARY] = options.megatron.parallel.padded(args[VOCABULARY], multiple)
    return {
        **args,
        "vocab_size": symbols["vocab_size"],
        "tokenizer_type": "HuggingFaceTokenizer",
        "seq_length": symbols["max_position_embeddings"],
        _DTYPE_KEY: TORCH_NAMES[dtype],
        "bf16": dtype == DType.BF16,
        "fp16": dtype == DType.F16,
        "transformer_impl": "local"
        if options.megatron.spec == Spec.LOCAL
        else "transformer_engine",
        "moe_grouped_gemm": options.megatron.experts != ExpertNames.SEQUENTIAL,
        "moe_use_legacy_grouped_gemm": options.megatron.experts == ExpertNames.FUSED,
        **_parallel_args(options.megatron.parallel, symbols["layers"]),
        "ckpt_format": "torch_dist" if options.layout == Target.MEGATRON else "torch",
        "iteration": ITERATION,
    }


def _parallel_args(parallel: Parallel, layers: int) -> dict[str, Any]:
    """Return the arguments that say how the model is spread."""
    args: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
    }
    if parallel.vpp > 1:
        args["virtual_pipeline_model_parallel_size"] = parallel.vpp
        args["num_layers_per_virtual_pipeline_stage"] = layers // (parallel.pp * parallel.vpp)
    if parallel.layers:
        args["decoder_first_pipeline_num_layers"] = parallel.layers[0]
        args["decoder_last_pipeline_num_layers"] = parallel.layers[-1]
    return args


def rank_modules(layout: Layout, beside: Mapping[str, str]) -> list[str]:
    """Return the modules of a rank whose state is saved, though it is empty."""
    modules: dict[str, None] = {}
    for tensor in layout.tensors.values():
        module, _, _ = tensor.name.rpartition(".")
        parent, _, own = module.rpartition(".")
        if tensor.role in _LINEAR and not tensor.transposition:
            modules[module] = None
        if own in beside:
            modules[f"{parent}.{beside[own]}"] = None
    return list(modules)


def module_states(layout: Layout, beside: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """Return the keys under which modules save their state, and how many shards each has.

    Megatron asks for those of its linear modules, TransformerEngine for those of norms and of the
    attention itself, too; a key that nobody asks for does no harm.
    """
    states: dict[str, int] = {}
    for tensor in layout.tensors.values():
        module, _, _ = tensor.name.rpartition(".")
        parent, _, own = module.rpartition(".")
        if tensor.role in _STATEFUL:
            states[f"{module}._extra_state"] = tensor.stack or 1
        if own in beside:
            states[f"{parent}.{beside[own]}._extra_state"] = 1
    return tuple(states.items())


def common_state(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every rank of Megatron saves besides its tensors, to be pickled."""
    values = {**args, _DTYPE_KEY: Global("torch", args[_DTYPE_KEY])}
    return {
        "args": Instance(Global("argparse", "Namespace"), values),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
    }


def args_of(state: Any) -> Mapping[str, Any]:
    """Return the arguments in a state that Megatron saved, whatever class they are of."""
    args = state.get("args") if type(state) is dict else None
    values = args.state if type(args) is OpaqueObject else args
    if type(values) is not dict:
        return {}
    return {key: _plain(value) for key, value in values.items() if type(key) is str}


def _plain(value: Any) -> Any:
    """Return an argument as it is, or in words where it is too large or no plain value."""
    kind = type(value)
    if (kind is int and abs(value) <= MAX_SIZE) or (kind is str and len(value) <= _MAX_TEXT):
        return value
    if kind in (list, tuple) and len(value) <= _MAX_ITEMS:
        return [shown(item) if type(item) in (list, tuple) else _plain(item) for item in value]
    return value if value is None or kind in (bool, float, DType) else shown(value)
