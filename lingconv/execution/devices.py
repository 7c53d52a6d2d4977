"""The GPUs that a run may use, from the value of `--device`."""

from importlib.util import find_spec

from lingconv.errors import UsageError

CPU, CUDA = "cpu", "cuda"
_ALL = "cuda:all"
_INSTEAD = "leave `device` out: the processors give the same bytes"


def gpus_of(device: str) -> tuple[str, ...]:
    """Return torch's names of the GPUs in `cpu` (none), `cuda`, `cuda:N` or `cuda:all`.

    Raises UsageError for any other value, and if torch, Triton or the GPU is missing.
    """
    kind, _, which = device.partition(":")
    if device == CPU:
        return ()
    if kind != CUDA or not (which in ("", "all") or which.isdecimal()):
        raise UsageError(f"`device={device}`", hint=f"one of {CPU}, {CUDA}, {CUDA}:N, {_ALL}")
    import torch  # takes seconds, so only if a GPU is asked for

    count = torch.cuda.device_count()
    if not count:
        raise UsageError(f"`device={device}`: torch finds no CUDA device here", hint=_INSTEAD)
    if find_spec("triton") is None:
        raise UsageError(f"`device={device}` needs Triton", hint="pip install triton")
    if which == "all":
        return tuple(f"{CUDA}:{number}" for number in range(count))
    if int(which or 0) >= count:
        raise UsageError(f"`device={device}`: there are {count}, numbered from 0", hint=_INSTEAD)
    return (f"{CUDA}:{which or 0}",)
