"""megatron-core as a client: loads a checkpoint, runs it, saves it again as torch_dist.

    python -m tests.megatron_client CHECKPOINT EXPECTED SAVE_TO TP PP EP

CHECKPOINT is an `iter_*` folder of torch_dist or of the files of ranks; the config.json in the
folder above describes its model.
Starts max(TP, EP) x PP gloo processes on this machine, and prints the largest differences of the
logits to EXPECTED, a safetensors file with `input_ids` and `logits`. On a CPU Megatron needs its
CUDA calls stubbed. SAVE_TO `-` saves nothing.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import megatron.core.dist_checkpointing
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.models.gpt.gpt_model  # noqa: F401
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file


def stub_cuda():
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    moe_utils.te_general_gemm = None

    class Tracker:
        def add(self, *args):
            pass

        def fork(self, *args, **kwargs):
            from contextlib import nullcontext

            return nullcontext()

    tracker = Tracker()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron") and hasattr(
            module, "get_cuda_rng_tracker"
        ):
            module.get_cuda_rng_tracker = lambda *args, **kwargs: tracker
    tensor_parallel.get_cuda_rng_tracker = tp_random.get_cuda_rng_tracker


def build_model(config, *, tp, pp, ep):
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    settings = TransformerConfig(
        num_layers=layers,
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=config["num_experts"],
        moe_layer_freq=[0] * dense + [1] * (layers - dense),
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        moe_shared_expert_intermediate_size=config["moe_intermediate_size"]
        * (config["num_shared_experts"] or 0)
        or None,
        moe_router_topk=config["num_experts_per_tok"],
        moe_router_num_groups=config["n_group"],
        moe_router_group_topk=config["topk_group"],
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=config["routed_scaling_factor"],
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        moe_grouped_gemm=False,
        mtp_num_layers=config["num_nextn_predict_layers"] or None,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        bf16=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    last = ps.is_pipeline_last_stage()
    mtp = None
    if settings.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False)
    model = GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        pre_process=ps.is_pipeline_first_stage(),
        post_process=last,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=config.get("partial_rotary_factor", 0.5),
        rotary_base=config["rope_theta"],
        mtp_block_spec=mtp,
        parallel_output=False,
    )
    return model.eval()


def forward(model, ids):
    """Return the logits on the last stage, main model first, then MTP; None on the others."""
    from megatron.core import parallel_state as ps

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.triu(torch.ones(1, 1, ids.shape[1], ids.shape[1]), 1).bool()
    if not ps.is_pipeline_first_stage():
        received = torch.empty(ids.shape[1], ids.shape[0], model.config.hidden_size)
        dist.recv(received, ps.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    logits = []
    if ps.is_pipeline_last_stage():
        model.output_layer.register_forward_hook(lambda _, __, out: logits.append(out[0].clone()))
    with torch.no_grad():
        out = model(ids, positions, mask, labels=ids)  # without labels MTP layers do not run
    if not ps.is_pipeline_last_stage():
        dist.send(out.contiguous(), ps.get_pipeline_model_parallel_next_rank())
        return None
    *mtp, main = (each.transpose(0, 1) for each in logits)
    return main, *mtp


def own_file(checkpoint, pp, ep):
    """Return where Megatron's get_checkpoint_name looks for this rank's file."""
    from megatron.core import parallel_state as ps

    pipeline = f"_{ps.get_pipeline_model_parallel_rank():03d}" if pp > 1 else ""
    expert = f"_{ps.get_expert_model_parallel_rank():03d}" if ep > 1 else ""
    folder = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}{pipeline}{expert}"
    return Path(checkpoint) / folder / "model_optim_rng.pt"


def work(rank, world, checkpoint, expected, save_to, tp, pp, ep, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    stub_cuda()
    ps.initialize_model_parallel(
        tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    stub_cuda()
    config = json.loads((Path(checkpoint).parent / "config.json").read_text())
    model = build_model(config, tp=tp, pp=pp, ep=ep)
    groups = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    if (Path(checkpoint) / ".metadata").exists():
        wanted = model.sharded_state_dict(metadata=groups)
        state = dist_checkpointing.load(wanted, str(checkpoint))
        model.load_state_dict({key: state[key] for key in wanted})
    else:
        state = torch.load(own_file(checkpoint, pp, ep), weights_only=False)
        model.load_state_dict(state["model"], strict=True)
    tensors = load_file(expected)
    logits = forward(model, tensors["input_ids"].long())
    found = [None] * world
    names = ("logits", "mtp_logits.0")
    errors = [
        float((value - tensors[name]).abs().max())
        for name, value in zip(names, logits or (), strict=False)
    ]
    dist.all_gather_object(found, errors)
    if save_to != "-":
        if rank == 0:
            Path(save_to).mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(model.sharded_state_dict(metadata=groups), save_to)
    if rank == 0:
        print(json.dumps({"errors": [errors for errors in found if errors]}))
    dist.barrier()
    dist.destroy_process_group()


def main():
    checkpoint, expected, save_to = sys.argv[1:4]
    tp, pp, ep = map(int, sys.argv[4:])
    world = max(tp, ep) * pp
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        args = world, checkpoint, expected, save_to, tp, pp, ep, store
        # Forked, so that Megatron is imported once, here, where no thread runs yet.
        mp.start_processes(work, args, nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
