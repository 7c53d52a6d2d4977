"""Kernels equal plain torch, bit for bit."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingconv.encodings.kernels import fp8_decode, numeric
from lingconv.encodings.kernels import fp8_encode as fp8
from lingconv.encodings.kernels import fp8_table as octaves
from lingconv.encodings.kernels.intrinsics import fused
from lingconv.encodings.kernels.random_normal import normal_rows, normal_table
from tests.support import E4M3, reference_dequantize, reference_quantize

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2**-126,
    -(2**-133),
    2**-133,
    448.0,
    464.0,
    3.3e38,
    1e-30,
    -65504.0,
]


def bf16_bits(values):
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def from_bf16_bits(bits):
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def quantize(values, rows, cols, min_amax=0.0, rounding=fp8.SCALE_F32, allow=False):
    """Run the kernel on a torch matrix; return torch codes and scales, and what it returned."""
    source = bf16_bits(values) if values.dtype == torch.bfloat16 else values.numpy()
    cols = cols or values.shape[1]
    codes = np.empty(values.shape, np.uint8)
    grid = (-(-values.shape[0] // rows), -(-values.shape[1] // cols))
    scales = np.empty(grid, np.float32)
    bad = fp8.quantize(source, codes, scales, rows, cols, min_amax, rounding, allow)
    return torch.from_numpy(codes).view(E4M3), torch.from_numpy(scales), bad


# Kernels have a way of their own for rows of whole chunks of 128 columns.
WIDTHS = st.integers(1, 300) | st.sampled_from([128, 256, 640])


@st.composite
def matrices(draw):
    """Matrices of odd shapes and wild magnitudes, with zero blocks and special values."""
    rows, cols = draw(st.integers(1, 300)), draw(WIDTHS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponent = draw(st.integers(-40, 30))
    spread = draw(st.sampled_from([0, 1, 6, 20]))
    values = rng.standard_normal((rows, cols)) * 2.0 ** (
        exponent + spread * rng.standard_normal((rows, cols))
    )
    values[rng.random((rows, cols)) < draw(st.sampled_from([0, 0, 0.5, 0.99]))] = 0.0
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=6)):
        values[rng.integers(rows), rng.integers(cols)] = value
    values[: draw(st.integers(0, rows))] *= draw(st.sampled_from([0.0, -0.0, 1.0]))
    tensor = torch.from_numpy(np.clip(values, -3e38, 3e38).astype(np.float32))
    return tensor.to(draw(st.sampled_from([torch.bfloat16, torch.float32])))


@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (1, 0), (64, 32), (2, 256)])
@settings(max_examples=60)
@given(values=matrices())
def test_quantize_equals_torch(rows, cols, values):
    codes, scales, bad = quantize(values, rows, cols)
    expected_codes, expected_scales = reference_quantize(values, rows, cols)
    assert bad == fp8.NO_NONFINITE
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


@settings(max_examples=40)
@given(values=matrices())
def test_quantize_with_rounded_scales_equals_torch(values):
    for rounding, options in (
        (fp8.SCALE_BF16, {"bf16_scale": True}),
        (fp8.SCALE_UE8M0, {"ue8m0": True}),
    ):
        codes, scales, _ = quantize(values, 128, 128, rounding=rounding)
        expected_codes, expected_scales = reference_quantize(values, 128, 128, **options)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


@settings(max_examples=40)
@given(values=matrices())
def test_ling_policy_equals_the_formula_of_lings_converter(values):
    """scale = amax.clamp(1e-4) / 448; ue8m0: 2^ceil(log2(max(scale, 1e-10))); w / scale."""
    values = values.bfloat16()
    padded = torch.zeros([-(-size // 128) * 128 for size in values.shape])
    padded[: values.shape[0], : values.shape[1]] = values.float()
    view = padded.view(-1, 128, padded.shape[1] // 128, 128)
    for ue8m0 in (False, True):
        scale = view.abs().amax((1, 3), keepdim=True).clamp(1e-4) / 448.0
        if ue8m0:
            scale = scale.maximum(torch.tensor(1e-10)).log2().ceil().exp2()
        expected = (view / scale).clamp(-448, 448).to(E4M3).view_as(padded)
        expected = expected[: values.shape[0], : values.shape[1]].contiguous()
        rounding = fp8.SCALE_UE8M0 if ue8m0 else fp8.SCALE_F32
        codes, scales, _ = quantize(values, 128, 128, 1e-4, rounding)
        assert torch.equal(scales, scale[:, 0, :, 0])
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def test_every_bf16_value_becomes_the_e4m3_that_torch_gives():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()].clamp(-448, 448).reshape(1, -1)
    codes, scales, _ = quantize(finite, 1, 0)
    assert scales.item() == 1.0
    assert torch.equal(codes.view(torch.uint8), finite.to(E4M3).view(torch.uint8))


def test_every_bf16_value_is_scaled_by_every_amax_as_torch_does():
    """All quotients that a block of BF16 can have: 128 mantissas of amax, 23 binades below it."""
    amax = torch.arange(0x3F80, 0x4000, dtype=torch.int32)
    codes = amax[:, None] - torch.arange(23 << 7, dtype=torch.int32)
    values = codes.to(torch.int16).view(torch.bfloat16)
    for rounding, options in (
        (fp8.SCALE_F32, {}),
        (fp8.SCALE_BF16, {"bf16_scale": True}),
        (fp8.SCALE_UE8M0, {"ue8m0": True}),
    ):
        codes, scales, _ = quantize(values, 1, 0, rounding=rounding)
        expected, expected_scales = reference_quantize(values, 1, 0, **options)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@numba.njit(nogil=True, error_model="numpy")
def by_product(values, codes, scales):
    fp8.encode_bf16_by_product(values, codes, 0, 1, scales, values.shape[1], fp8.room_for(1))


@numba.njit(nogil=True, error_model="numpy")
def by_table(values, codes, scales):
    fp8.encode_bf16_by_table(values, codes, 0, 1, scales, values.shape[1], fp8.room_for(1))


@pytest.mark.parametrize("encode", [by_product, by_table])
def test_both_ways_to_encode_give_the_e4m3_that_torch_gives(encode):
    """Every BF16 of both signs that a scale brings below 448, for scales of all sorts."""
    if encode is by_table and not octaves.can_look_up():
        pytest.skip("the processor has no AVX512-VBMI")
    rng = np.random.default_rng(0)
    mantissas = [0, 1, 0x7FFFFE, 0x400000, 0x200000, *rng.integers(0, 0x7FFFFF, 300)]
    for mantissa in mantissas:
        exponent = int(rng.choice([40, 100, 127, 160, 215]))
        scale = np.array([exponent << 23 | int(mantissa)], np.uint32).view(np.float32)
        largest = int((scale * np.float32(448)).view(np.uint32)[0] >> 16)
        magnitudes = np.maximum(largest - np.arange(32 << 7), 0).astype(np.uint16)
        mixed = np.concatenate([magnitudes, magnitudes | 0x8000])
        rng.shuffle(mixed)  # what is small lies among what is not
        for values in (mixed, magnitudes):
            codes = np.empty((1, values.size), np.uint8)
            encode(values[None], codes, scale)
            quotients = (values.astype(np.uint32) << 16).view(np.float32) / scale
            expected = torch.from_numpy(quotients).to(E4M3).view(torch.uint8)
            assert torch.equal(torch.from_numpy(codes[0]), expected)


@numba.njit(nogil=True, error_model="numpy")
def wrong_quotients(first, last, found):
    """Note mantissas of scales and of BF16 whose quotient is not rounded once; return how many."""
    count = 0
    for mantissa in range(first, last):
        scale = numeric.float_of(np.uint32(0x3F800000 + mantissa))
        reciprocal = np.float32(1) / scale
        rest = fused(-scale, reciprocal, np.float32(1)) * reciprocal
        wrong = 0
        for weight in range(128):
            value = numeric.float_of(np.uint32(0x3F800000 + (weight << 16)))
            wrong += fp8._quotient(value, reciprocal, rest) != value / scale
        if wrong:
            for weight in range(128):
                value = numeric.float_of(np.uint32(0x3F800000 + (weight << 16)))
                if fp8._quotient(value, reciprocal, rest) != value / scale:
                    found[count] = mantissa, weight
                    count += 1
    return count


def test_quotients_are_right_for_every_pair_of_mantissas():
    """2^23 mantissas of a scale, 2^7 of a BF16; exponents change nothing where scales are plain."""
    found = np.zeros((1000, 2), np.int64)
    count = wrong_quotients(0, 1 << 23, found)
    assert count == 11
    for mantissa, weight in found[:count]:
        scale = np.uint32(0x3F800000 + mantissa).view(np.float32)
        quotient = np.uint32(0x3F800000 + (weight << 16)).view(np.float32) / scale
        # e4m3 rounds at numbers of five bits, and its subnormals at ones of up to four.
        is_near_a_middle = (int(quotient.view(np.uint32)) + 2) % 2**19 <= 4
        assert is_near_a_middle == (mantissa == 0x7FFFFF), (mantissa, weight)


def test_a_scale_with_a_mantissa_of_ones_takes_the_long_way():
    scale = np.uint32(0x3F7FFFFF).view(np.float32)
    values = torch.full((1, 128), 2**-10, dtype=torch.bfloat16)
    values[0, 1] = -(2**-10)
    codes, scales, _ = quantize(values, 1, 0, min_amax=float(scale * np.float32(448)))
    assert scales.item() == scale
    expected = (values.float() / float(scale)).to(E4M3)
    assert expected[0, 0].item() == 2**-9  # half-way without the last bit of the quotient
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def test_random_float32_bits_become_the_e4m3_that_torch_gives():
    bits = np.random.default_rng(7).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy()).nan_to_num(0.0).clamp(-448, 448)
    values = torch.cat([values, torch.tensor([448.0])]).reshape(1, -1)
    codes, scales, _ = quantize(values, 1, 0)
    assert scales.item() == 1.0
    assert torch.equal(codes.view(torch.uint8), values.to(E4M3).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@settings(max_examples=40)
@given(data=st.data())
def test_dequantize_equals_torch(dtype, data):
    rows, cols = data.draw(st.integers(1, 300)), data.draw(WIDTHS)
    block_rows, block_cols = data.draw(st.sampled_from([(128, 128), (1, 0), (64, 32), (2, 256)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 1
    grid = (-(-rows // block_rows), -(-cols // (block_cols or cols)))
    highest = data.draw(st.sampled_from([0, 100]))
    scales = np.exp2(rng.uniform(-140, highest, grid)).astype(np.float32)
    first = data.draw(st.integers(0, rows - 1))
    top = first // block_rows
    target = np.empty((rows - first, cols), np.uint16 if dtype == torch.bfloat16 else np.float32)
    nonfinite = fp8_decode.dequantize(
        codes[first:],
        scales[top:],
        target,
        block_rows,
        block_cols or cols,
        first - top * block_rows,
    )
    expected = reference_dequantize(
        torch.from_numpy(codes).view(E4M3), torch.from_numpy(scales), block_rows, block_cols, dtype
    )[first:]
    found = from_bf16_bits(target) if dtype == torch.bfloat16 else torch.from_numpy(target)
    width = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found.view(width), expected.contiguous().view(width))
    assert nonfinite == 0


def test_quantize_stops_at_nonfinite_and_names_the_row():
    for value in (float("nan"), float("inf"), float("-inf")):
        for dtype in (torch.bfloat16, torch.float32):
            values = torch.ones(300, 200, dtype=dtype)
            values[200, 150] = value
            assert quantize(values, 128, 128)[2] == 128
            assert quantize(values, 1, 0)[2] == 200


def test_allowed_nonfinite_saturates_and_leaves_the_rest_of_the_block_alone():
    values = torch.full((128, 128), 0.5, dtype=torch.bfloat16)
    values[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    codes, scales, bad = quantize(values, 128, 128, allow=True)
    assert bad == fp8.NO_NONFINITE
    assert scales.item() == torch.tensor(0.5 / 448.0).item()
    assert codes[0, 0].isnan()
    assert codes.float()[0, 1:4].tolist() == [448.0, -448.0, 448.0]


@pytest.mark.parametrize("cols", [4, 128])
def test_dequantize_counts_nan_codes_and_overflow(cols):
    codes = np.full((2, cols), 0x38, np.uint8)
    target = np.empty((2, cols), np.uint16)
    assert fp8_decode.dequantize(codes, np.ones((1, 1), np.float32), target, 128, 128, 0) == 0
    codes[1, 2] = 0xFF
    assert fp8_decode.dequantize(codes, np.ones((1, 1), np.float32), target, 128, 128, 0) == 1
    assert from_bf16_bits(target)[1, 2].isnan()


def test_bf16_and_f32_convert_as_torch_does():
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 500_000, dtype=np.uint32)
    values = bits.view(np.float32).copy()
    values[np.isnan(values)] = 1.0
    rounded = np.empty(values.shape, np.uint16)
    assert numeric.f32_to_bf16(values, rounded) == 1  # infinities among them
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(from_bf16_bits(rounded).view(torch.int16), expected.view(torch.int16))
    widened = np.empty(values.shape, np.float32)
    numeric.bf16_to_f32(rounded, widened)
    assert np.array_equal(widened, expected.float().numpy())
    assert numeric.f32_to_bf16(np.array([np.nan], np.float32), rounded[:1]) == 1
    assert from_bf16_bits(rounded[:1]).isnan().all()


def test_quantizing_what_was_dequantized_changes_nothing():
    weight = torch.randn(384, 256).bfloat16() * 0.02
    codes, scales, _ = quantize(weight, 128, 128)
    back = reference_dequantize(codes, scales)
    again, scales_again, _ = quantize(back, 128, 128)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scales_again, scales)


def test_random_weights_depend_on_position_only():
    table = normal_table()
    whole = np.empty(1000, np.float32)
    normal_rows(whole, 0, 77, 5, table, 0.0, 0.02)
    for start, count in ((0, 10), (70, 30), (500, 500)):
        part = np.empty(count, np.float32)
        normal_rows(part, start, 77, 5, table, 0.0, 0.02)
        assert np.array_equal(part, whole[start : start + count])
    other = np.empty(1000, np.float32)
    normal_rows(other, 0, 77, 6, table, 0.0, 0.02)
    assert not np.array_equal(whole, other)


def test_random_weights_look_like_weights():
    values = np.empty((1024, 2048), np.float32)
    normal_rows(values.reshape(-1), 0, 2048, 1, normal_table(), 0.0, 0.02)
    deviations = values.std(0)
    assert abs(values.mean()) < 1e-4
    assert 0.0195 < np.median(deviations) < 0.0205
    outliers = (deviations > 0.1).sum()
    assert 1 <= outliers <= 20
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.1
