"""Saves `forward/two-mtp` with megatron-core 0.19.2: what this folder holds beside this file.

    lingconv convert tests/data/forward/two-mtp TD --to megatron --spec local
    python tests/data/megatron-0.19/generate.py TD/iter_0000001

Run in the root of the repository, with megatron-core 0.19.2, triton and torch 2.13. The wheel
asks for Python 3.12; under 3.11 `typing.override` is the one thing that it misses. The tests read
the results, never this file.

    two-mtp             what `dist_checkpointing.save` wrote: the arguments are Megatron's own, as
                        its `parse_args` and `validate_args` return them for the words below
    module_names.json   the names in `state_dict()` of the model, which the file of a rank has

Nothing is saved unless Megatron's logits, and those of both MTP layers, are the ones that
inclusionAI's code computes (`forward/two-mtp.expected.safetensors`).
"""

import json
import shutil
import sys
import tempfile
import typing
from pathlib import Path

import torch.distributed as dist
import typing_extensions
from safetensors.torch import load_file

if not hasattr(typing, "override"):
    typing.override = typing_extensions.override

sys.path.insert(0, str(Path.cwd()))
from tests import megatron_client as client

HERE = Path(__file__).parent
MODEL = HERE.parent / "forward/two-mtp"
ITERATION = 3
WORDS = """
--num-layers 2 --hidden-size 48 --ffn-hidden-size 64 --num-attention-heads 2 --kv-channels 24
--group-query-attention --num-query-groups 2 --seq-length 128 --max-position-embeddings 128
--position-embedding-type rope --rotary-base 600000 --rotary-percent 1.0 --swiglu
--disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 --qk-layernorm
--untie-embeddings-and-output-weights --num-experts 4 --moe-layer-freq ([0]*1+[1]*1)
--moe-ffn-hidden-size 20 --moe-router-topk 1 --moe-router-score-function sigmoid
--moe-router-topk-scaling-factor 2.5 --moe-router-enable-expert-bias --moe-router-dtype fp32
--moe-router-load-balancing-type none --moe-token-dispatcher-type allgather --mtp-num-layers 2
--vocab-size 130 --make-vocab-size-divisible-by 1 --tokenizer-type NullTokenizer --bf16
--transformer-impl local --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1
--train-iters 1 --lr 1e-4 --ckpt-format torch_dist
"""


def arguments():
    """Return the Namespace that Megatron's launcher makes of WORDS."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    sys.argv[1:] = WORDS.split()
    args = validate_args(parse_args())
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, 1
    )
    return args


def check_logits(model):
    tensors = load_file(f"{MODEL}.expected.safetensors")
    found = client.forward(model, tensors["input_ids"].long())
    for name, logits in zip(("logits", "mtp_logits.0", "mtp_logits.1"), found, strict=True):
        error = float((logits - tensors[name]).abs().max())
        print(name, error)
        assert error < 1e-4


def main():
    source = sys.argv[1]
    args = arguments()
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    store = tempfile.mkdtemp()
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
    client.stub_cuda()
    ps.initialize_model_parallel(1, 1, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    client.stub_cuda()
    config = json.loads((MODEL / "config.json").read_text())
    model = client.build_model(config, tp=1, pp=1, ep=1)
    groups = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    wanted = model.sharded_state_dict(metadata=groups)
    state = dist_checkpointing.load(wanted, source)
    model.load_state_dict({key: state[key] for key in wanted})
    check_logits(model)
    biases = {name: value.clone() for name, value in model.named_buffers() if "bias" in name}
    model.bfloat16()
    for name, value in biases.items():
        module, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(module), buffer, value)
    target = HERE / f"two-mtp/iter_{ITERATION:07d}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    dist_checkpointing.save(
        {**common, "model": model.sharded_state_dict(metadata=groups)}, str(target)
    )
    names = sorted(name for name in model.state_dict() if not name.endswith("_extra_state"))
    (HERE / "module_names.json").write_text(json.dumps(names, indent=1) + "\n")
    (target.parent / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
