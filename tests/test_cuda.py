"""A GPU gives the processor's bytes: kernel by kernel, and in whole conversions."""

import numpy as np
import pytest
import torch

from lingconv import (
    CheckpointError,
    ConvertOptions,
    Fp8Options,
    GgufOptions,
    Resources,
    UsageError,
    convert,
    synth,
)
from lingconv.encodings.kernels import fp8_decode
from lingconv.encodings.kernels import fp8_encode as fp8
from lingconv.execution.devices import gpus_of
from tests.support import rewrite, tree_digest

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
ROUNDINGS = (fp8.SCALE_F32, fp8.SCALE_BF16, fp8.SCALE_UE8M0)


@pytest.fixture
def cuda():
    from lingconv.encodings.kernels import fp8_triton as cuda

    return cuda


def bits_of(values):
    """Return BF16 as numpy's uint16, float32 as it is."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()


def quantize_both(cuda, values, block, min_amax, rounding):
    """Return codes and scales of the processor and of the GPU, and what the GPU noted."""
    block = block[0], block[1] or values.shape[1]
    grid = tuple(-(-n // size) for n, size in zip(values.shape, block, strict=True))
    codes, scales = np.empty(values.shape, np.uint8), np.empty(grid, np.float32)
    fp8.quantize(bits_of(values), codes, scales, *block, min_amax, rounding, True)
    on_gpu = values.cuda()
    found = torch.full(values.shape, 0x55, dtype=torch.uint8, device="cuda")
    found_scales = torch.full(grid, -1.0, device="cuda")
    odd = torch.zeros(1, dtype=torch.int32, device="cuda")
    cuda.quantize(on_gpu, found, found_scales, odd, block, min_amax, rounding)
    return (codes, scales), (found.cpu().numpy(), found_scales.cpu().numpy()), odd.item()


@needs_gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_all_quotients_that_a_block_of_bf16_can_have(cuda, rounding):
    """128 mantissas of amax, 23 binades below it, both signs, both zeros."""
    amax = torch.arange(0x3F80, 0x4000, dtype=torch.int32)
    codes = amax[:, None] - torch.arange(23 << 7, dtype=torch.int32)
    values = codes.to(torch.int16).view(torch.bfloat16)
    values = torch.cat([values, -values])
    values[:, -2:] = torch.tensor([0.0, -0.0])
    expected, found, odd = quantize_both(cuda, values, (1, 0), 0.0, rounding)
    assert odd == 0
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(found[0], expected[0])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [(128, 128), (1, 0), (64, 32)])
@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 7), (257, 1029), (1024, 7168)])
def test_quantize_gives_the_processors_bytes(cuda, shape, block, dtype):
    torch.manual_seed(sum(shape))
    values = torch.randn(shape) * torch.exp2(8 * torch.randn(shape)) * 0.02
    values[: shape[0] // 3] = 0.0
    values = values.to(dtype)
    for rounding in ROUNDINGS:
        for min_amax in (0.0, 1e-4):
            expected, found, odd = quantize_both(cuda, values, block, min_amax, rounding)
            assert odd == 0
            assert np.array_equal(found[1], expected[1])
            assert np.array_equal(found[0], expected[0])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("block", [(128, 128), (1, 0), (48, 80)])
@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 7), (257, 1029), (1024, 7168)])
def test_dequantize_gives_the_processors_bytes(cuda, shape, block, dtype):
    rng = np.random.default_rng(sum(shape))
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80
    block = block[0], block[1] or shape[1]
    grid = tuple(-(-n // size) for n, size in zip(shape, block, strict=True))
    scales = np.exp2(rng.uniform(-100, 60, grid)).astype(np.float32)
    if dtype == torch.float16:
        scales = np.exp2(rng.uniform(-20, -2, grid)).astype(np.float32)
    first = min(shape[0] - 1, 37)
    wide = np.empty((shape[0] - first, shape[1]), np.float32)
    upper = scales[first // block[0] :]
    assert fp8_decode.dequantize(codes[first:], upper, wide, *block, first % block[0]) == 0
    found = torch.empty(wide.shape, dtype=dtype, device="cuda")
    odd = torch.zeros(1, dtype=torch.int32, device="cuda")
    on_gpu = torch.from_numpy(codes[first:].copy()).cuda()
    grids = torch.from_numpy(scales[first // block[0] :].copy()).cuda()
    cuda.dequantize(on_gpu, grids, found, odd, block, first % block[0])
    expected = torch.from_numpy(wide).to(dtype)
    assert odd.item() == 0
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


@needs_gpu
def test_whatever_is_not_finite_is_noted(cuda):
    for value in (float("nan"), float("inf"), float("-inf")):
        values = torch.ones(300, 200, dtype=torch.bfloat16)
        values[200, 150] = value
        for block in ((128, 128), (1, 0)):
            assert quantize_both(cuda, values, block, 0.0, fp8.SCALE_F32)[2] == 1
        odd = torch.zeros(1, dtype=torch.int32, device="cuda")
        cuda.convert(values.cuda(), torch.empty(300, 200, device="cuda"), odd)
        assert odd.item() == 1
    tiny = torch.full((128, 128), 2.0**-100)
    assert quantize_both(cuda, tiny, (128, 128), 0.0, fp8.SCALE_F32)[2] == 1
    large = torch.full((128, 128), 7e4, device="cuda")
    odd = torch.zeros(1, dtype=torch.int32, device="cuda")
    cuda.convert(large, torch.empty(128, 128, dtype=torch.float16, device="cuda"), odd)
    assert odd.item() == 1
    codes = torch.full((2, 4), 0x38, dtype=torch.uint8, device="cuda")
    odd.zero_()
    target = torch.empty(2, 4, dtype=torch.bfloat16, device="cuda")
    cuda.dequantize(codes, torch.ones(1, 1, device="cuda"), target, odd, (128, 128), 0)
    assert odd.item() == 0
    codes[1, 2] = 0xFF
    cuda.dequantize(codes, torch.ones(1, 1, device="cuda"), target, odd, (128, 128), 0)
    assert odd.item() == 1


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_convert_rounds_as_torch_does(cuda, dtype):
    bits = np.random.default_rng(3).integers(0, 2**32, 1_000_001, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy()).nan_to_num(0.0).clamp(-6e4, 6e4)
    found = torch.empty(values.shape, dtype=dtype, device="cuda")
    odd = torch.zeros(1, dtype=torch.int32, device="cuda")
    cuda.convert(values.cuda(), found, odd)
    assert odd.item() == 0
    assert torch.equal(found.cpu().view(torch.uint8), values.to(dtype).view(torch.uint8))


@pytest.fixture
def strips(monkeypatch):
    """The strips that a GPU filled."""
    from lingconv.execution.pipeline.gpu_transcoder import GpuTranscoder

    seen = []
    run = GpuTranscoder.run
    monkeypatch.setattr(
        GpuTranscoder,
        "run",
        lambda self, strip, *rest: (seen.append(strip), run(self, strip, *rest))[1],
    )
    return seen


def both(source, tmp_path, options, name, device="cuda"):
    """Convert on the processor and on a GPU; return the folder, which is the same."""
    cpu, gpu = tmp_path / f"{name}-cpu", tmp_path / f"{name}-gpu"
    convert(source, cpu, options)
    convert(source, gpu, options, resources=Resources(device=device))
    assert tree_digest(gpu).keys() == tree_digest(cpu).keys()
    for path in cpu.glob("*.safetensors"):
        assert (gpu / path.name).read_bytes() == path.read_bytes()
    return cpu


@needs_gpu
@pytest.mark.parametrize(
    "fp8_options",
    [
        Fp8Options(),
        Fp8Options(scale="ue8m0"),
        Fp8Options(scale="ue8m0", scale_dtype="e8m0"),
        Fp8Options(dialect="compressed-tensors"),
        Fp8Options(scheme="channel"),
    ],
    ids=lambda o: f"{o.scheme}-{o.scale}-{o.resolved_dialect}-{o.scale_dtype}",
)
def test_conversions_give_the_processors_bytes(tmp_path, strips, fp8_options):
    source = tmp_path / "source"
    synth("tiny", source)
    quantized = both(source, tmp_path, ConvertOptions(dtype="fp8", fp8=fp8_options), "fp8")
    for dtype in ("bf16", "f16", "f32"):
        both(quantized, tmp_path, ConvertOptions(dtype=dtype), dtype)
    both(tmp_path / "f16-cpu", tmp_path, ConvertOptions(dtype="bf16"), "narrow")
    other = Fp8Options() if fp8_options.scheme == "channel" else Fp8Options(scheme="channel")
    again = ConvertOptions(dtype="fp8", fp8=other, allow_requantize=True)
    both(quantized, tmp_path, again, "again")
    merged = both(source, tmp_path, ConvertOptions(dtype="fp8", layout="hf-merged"), "merged")
    both(merged, tmp_path, ConvertOptions(dtype="bf16", layout="hf"), "split", device="cuda:all")
    assert len(strips) > 100


@needs_gpu
def test_what_the_gpu_has_no_kernel_for_is_left_to_the_processor(golden, tmp_path, strips):
    for device in ("cpu", "cuda"):
        options = ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="q4_k_m"))
        convert(golden, tmp_path / f"{device}.gguf", options, resources=Resources(device=device))
    assert (tmp_path / "cuda.gguf").read_bytes() == (tmp_path / "cpu.gguf").read_bytes()
    kinds = {type(strip.transfer.target.encoding).__name__ for strip in strips}
    assert kinds == {"Plain"}  # norms and biases


@needs_gpu
def test_what_is_not_finite_is_refused_by_name_or_comes_out_the_same(tmp_path, strips):
    source = tmp_path / "source"
    synth("tiny", source)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def spoil(tensors):
        tensors[name][5, 7] = float("nan")
        tensors[name][6, 7] = float("-inf")

    rewrite(source, spoil)
    messages = set()
    for device in ("cpu", "cuda"):
        with pytest.raises(CheckpointError, match=name) as caught:
            convert(
                source,
                tmp_path / device,
                ConvertOptions(dtype="fp8"),
                resources=Resources(device=device),
            )
        messages.add(str(caught.value))
    assert len(messages) == 1
    both(source, tmp_path, ConvertOptions(dtype="fp8", allow_nonfinite=True), "allowed")
    assert strips


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:one", "cuda:-1", "cpu:0"])
def test_words_that_are_no_devices(word):
    if word == "cuda:":
        word = "cuda:x"
    with pytest.raises(UsageError, match=word):
        gpus_of(word)


def test_the_words_for_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("lingconv.execution.devices.find_spec", lambda name: object())
    assert gpus_of("cpu") == ()
    assert gpus_of("cuda") == ("cuda:0",)
    assert gpus_of("cuda:1") == ("cuda:1",)
    assert gpus_of("cuda:all") == ("cuda:0", "cuda:1")
    with pytest.raises(UsageError, match="there are 2"):
        gpus_of("cuda:2")
    monkeypatch.setattr("lingconv.execution.devices.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Triton"):
        gpus_of("cuda")


def test_without_a_gpu_nothing_is_begun(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="no CUDA device"):
        convert(
            golden,
            tmp_path / "out",
            ConvertOptions(dtype="fp8"),
            resources=Resources(device="cuda"),
        )
    assert not (tmp_path / "out").exists()
