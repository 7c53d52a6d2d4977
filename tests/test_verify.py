"""verify: right conversions pass, figures are what they say, the command answers with its code."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import lingconv
from lingconv import (
    CheckpointError,
    ConvertOptions,
    ForwardOptions,
    Fp8Options,
    UsageError,
    VerifyOptions,
)
from lingconv.cli.app import app
from lingconv.encodings.dtypes import DType
from lingconv.encodings.fp8 import Fp8
from lingconv.encodings.kernels import compare as kernel
from lingconv.verification import scales
from lingconv.verification.logits import compare_logits
from lingconv.verification.reports.verdict_page import render
from tests.conftest import DATA
from tests.support import edit_json, read_tensors, reference_quantize, rewrite

RIGHT = {
    "reshard": ConvertOptions(max_shard_bytes=1_000_000),
    "f32": ConvertOptions(dtype="f32"),
    "f16": ConvertOptions(dtype="f16"),
    "fp8": ConvertOptions(dtype="fp8"),
    "fp8 ling": ConvertOptions(dtype="fp8", fp8=Fp8Options(scale="ling")),
    "fp8 ue8m0": ConvertOptions(dtype="fp8", fp8=Fp8Options(scale="ue8m0")),
    "fp8 e8m0": ConvertOptions(dtype="fp8", fp8=Fp8Options(scale="ue8m0", scale_dtype="e8m0")),
    "fp8 channel": ConvertOptions(dtype="fp8", fp8=Fp8Options(scheme="channel")),
    "fp8 ct": ConvertOptions(dtype="fp8", fp8=Fp8Options(dialect="compressed-tensors")),
    "without mtp": ConvertOptions(mtp="drop"),
    "mtp only": ConvertOptions(mtp="only"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_every_right_conversion_passes(name, golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", RIGHT[name])
    verdict = lingconv.verify(golden, tmp_path / "out")
    assert verdict.ok, verdict.findings[:3]
    tensors = {"without mtp": 51, "mtp only": 41}.get(name, 92)
    assert len(verdict.tensors) == tensors
    assert (verdict.forward is None) == (name == "mtp only")
    exact = name in ("reshard", "f32", "without mtp", "mtp only")
    assert verdict.kind == ("relayout" if exact else "rounded" if name == "f16" else "fp8")
    if verdict.forward and exact:
        assert verdict.forward.logits.max_kld == 0


def test_what_llm_compressor_made_passes(golden, golden_block, golden_channel):
    for theirs in (golden_block, golden_channel):
        verdict = lingconv.verify(golden, theirs)
        assert verdict.ok, verdict.findings[:3]
        assert len(verdict.scales) == 63


def test_sizes_that_128_does_not_divide(tmp_path):
    source = DATA / "forward" / "wide-heads"
    for scheme in ("block", "channel"):
        lingconv.quantize(source, tmp_path / scheme, Fp8Options(scheme=scheme))
        verdict = lingconv.verify(source, tmp_path / scheme)
        assert verdict.ok, verdict.findings[:3]
        names = {item.name for item in verdict.tensors}
        assert {"layers.0.q", "layers.0.q_bias", "layers.3.experts.7.down"} <= names


def test_there_and_back(golden, tmp_path):
    lingconv.quantize(golden, tmp_path / "fp8")
    lingconv.convert(tmp_path / "fp8", tmp_path / "bf16", ConvertOptions(dtype="bf16"))
    for level in ("bytes", "tensors", "forward"):
        verdict = lingconv.verify(tmp_path / "fp8", tmp_path / "bf16", VerifyOptions(level=level))
        assert verdict.ok, verdict.findings[:3]
    lingconv.convert(golden, tmp_path / "f32", ConvertOptions(dtype="f32"))
    rounded = ConvertOptions(dtype="bf16")
    lingconv.convert(tmp_path / "f32", tmp_path / "bf16-again", rounded)
    assert lingconv.verify(tmp_path / "f32", tmp_path / "bf16-again").ok


def damaged(source, folder, change):
    shutil.copytree(source, folder)
    rewrite(folder, change)
    return folder


class TestLevels:
    def test_bytes_holds_what_should_be_equal_to_every_bit(self, golden, tmp_path):
        def negate_zero(tensors):
            tensors["model.norm.weight"][7] = -0.0

        zero = damaged(golden, tmp_path / "zero", lambda t: t["model.norm.weight"][7].zero_())
        minus = damaged(golden, tmp_path / "minus", negate_zero)
        verdict = lingconv.verify(zero, minus, VerifyOptions(level="bytes"))
        assert [finding.tensor for finding in verdict.findings] == ["norm"]
        assert "1 of 256 elements differ" in verdict.findings[0].message

    def test_bytes_does_not_judge_what_was_rounded_to_fp8(self, golden, tmp_path):
        lingconv.quantize(golden, tmp_path / "fp8")
        options = VerifyOptions(level="bytes")
        verdict = lingconv.verify(golden, tmp_path / "fp8", options)
        assert verdict.ok
        assert {item.target for item in verdict.tensors} == {"bf16", "f32"}

    def test_an_ulp_is_one_too_many_for_bytes(self, golden, tmp_path):
        lingconv.quantize(golden, tmp_path / "fp8")
        lingconv.convert(tmp_path / "fp8", tmp_path / "bf16", ConvertOptions(dtype="bf16"))
        name = "model.layers.0.mlp.up_proj.weight"

        def nudge(tensors):
            tensors[name].view(torch.int16)[3, 4] += 1

        off = damaged(tmp_path / "bf16", tmp_path / "off", nudge)
        answers = {
            level: lingconv.verify(tmp_path / "fp8", off, VerifyOptions(level=level)).ok
            for level in ("bytes", "tensors")
        }
        assert answers == {"bytes": False, "tensors": True}

    def test_figures_are_what_torch_says(self, golden, tmp_path):
        lingconv.quantize(golden, tmp_path / "fp8")
        verdict = lingconv.verify(golden, tmp_path / "fp8", VerifyOptions(level="tensors"))
        assert verdict.forward is None
        figures = {item.name: item for item in verdict.tensors}
        weight = read_tensors(golden)["model.layers.0.mlp.down_proj.weight"].double()
        stored = read_tensors(tmp_path / "fp8")
        name = "model.layers.0.mlp.down_proj.weight"
        wide = stored[name + "_scale_inv"].double()
        wide = wide.repeat_interleave(128, 0).repeat_interleave(128, 1)
        after = stored[name].double() * wide
        error = weight - after
        found = figures["layers.0.down"]
        assert found.elements == weight.numel()
        assert found.max_abs == pytest.approx(error.abs().max().item(), rel=1e-5)
        rel = (error.norm() / weight.norm()).item()
        assert found.rel_error == pytest.approx(rel, rel=1e-5)
        assert found.snr_db == pytest.approx(-20 * math.log10(rel), rel=1e-5)
        cosine = torch.cosine_similarity(weight.flatten(), after.flatten(), dim=0).item()
        assert found.cosine == pytest.approx(cosine, abs=1e-6)
        assert found.zeroed == ((weight != 0) & (after == 0)).sum()
        blocks = {
            (top, left): (error[top : top + 128, left : left + 128].norm()
                          / weight[top : top + 128, left : left + 128].norm()).item()
            for top in range(0, 256, 128) for left in range(0, 512, 128)
        }  # fmt: skip
        worst = max(blocks, key=blocks.get)
        assert (found.worst_block.rows[0], found.worst_block.cols[0]) == worst
        assert found.worst_block.rel_error == pytest.approx(blocks[worst], rel=1e-5)

    def test_saturation_is_counted(self, golden, tmp_path):
        lingconv.quantize(golden, tmp_path / "fp8")
        name = "model.layers.0.mlp.up_proj.weight"

        def halve(tensors):
            tensors[name + "_scale_inv"] /= 2

        broken = damaged(tmp_path / "fp8", tmp_path / "broken", halve)
        verdict = lingconv.verify(golden, broken, VerifyOptions(level="tensors"))
        figures = {item.name: item for item in verdict.tensors}
        weight = read_tensors(golden)[name].float()
        scale = read_tensors(broken)[name + "_scale_inv"]
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert figures["layers.0.up"].saturated == (weight.abs() > 464 * wide).sum() > 0
        assert figures["layers.0.gate"].saturated == 0

    def test_pinned_routing_takes_the_sources_experts(self, golden, golden_block):
        free, pinned = (
            lingconv.verify(golden, golden_block, VerifyOptions(pin_routing=pin)).forward
            for pin in (False, True)
        )
        assert max(layer.flipped_tokens or 0 for layer in free.layers) > 0
        assert max(layer.flipped_tokens or 0 for layer in pinned.layers) == 0
        assert pinned.logits.mean_kld < free.logits.mean_kld
        assert pinned.pinned

    def test_serving_rounds_activations_too(self, golden, golden_block):
        options = [VerifyOptions(forward=ForwardOptions(activations=a)) for a in ("plain", "fp8")]
        plain, fp8 = (lingconv.verify(golden, golden_block, each).forward for each in options)
        assert fp8.layers[1].mean_cosine < plain.layers[1].mean_cosine


class TestThresholds:
    def test_each_can_be_set(self, golden, golden_block):
        for strict, word in (
            ({"max_rel_error": 0.02}, "relative error"),
            ({"min_cosine": 0.9999}, "hidden states of"),
            ({"max_mean_kld": 1e-4}, "mean KLD"),
        ):
            verdict = lingconv.verify(golden, golden_block, VerifyOptions(**strict))
            assert not verdict.ok
            assert any(word in finding.message for finding in verdict.findings)
            assert strict.items() <= verdict.thresholds.items()

    def test_a_looser_one_accepts_more_but_never_what_should_be_equal(self, golden, tmp_path):
        lingconv.quantize(golden, tmp_path / "fp8")
        name = "model.layers.0.mlp.up_proj.weight"
        noise = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)) * 0.02 + 1

        def wobble(tensors):
            tensors[name + "_scale_inv"] *= noise.repeat(2, 1)

        off = damaged(tmp_path / "fp8", tmp_path / "off", wobble)
        options = VerifyOptions(level="tensors", max_rel_error=0.1)
        kinds = {finding.kind for finding in lingconv.verify(golden, off, options).findings}
        assert kinds == {"scale"}
        flipped = damaged(golden, tmp_path / "flip", lambda t: t["model.norm.weight"][0].mul_(2))
        assert not lingconv.verify(golden, flipped, options).ok


class TestBadInput:
    def test_two_different_models(self, golden):
        verdict = lingconv.verify(golden, DATA / "forward" / "yarn")
        assert not verdict.ok
        assert "different models" in verdict.findings[0].message
        assert verdict.forward is None

    def test_a_source_that_cannot_be_trusted(self, golden, tmp_path):
        broken = damaged(golden, tmp_path / "c", lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(CheckpointError):
            lingconv.verify(broken, golden)

    def test_a_target_that_is_no_checkpoint(self, golden, tmp_path):
        with pytest.raises(UsageError):
            lingconv.verify(golden, tmp_path / "nothing")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError):
            lingconv.verify(golden, tmp_path / "empty")

    def test_activations_that_overflow_in_the_target_only(self, golden, tmp_path):
        options = VerifyOptions(max_rel_error=1e30)
        lingconv.convert(golden, tmp_path / "f16", ConvertOptions(dtype="f16"))
        name = "model.layers.1.mlp.shared_experts.up_proj.weight"
        blown = damaged(tmp_path / "f16", tmp_path / "blown", lambda t: t[name].fill_(60000))
        edit_json(blown / "config.json", lambda config: config.update(rms_norm_eps=1e-6))
        verdict = lingconv.verify(golden, blown, options)
        assert not verdict.ok

    def test_a_broken_file_comes_first(self, golden, tmp_path):
        shutil.copytree(golden, tmp_path / "c")
        shard = tmp_path / "c" / "model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:100])
        verdict = lingconv.verify(golden, tmp_path / "c")
        assert not verdict.ok
        assert shard.name in str(verdict.findings[0])
        assert verdict.forward is None

    def test_a_dtype_that_holds_no_weights(self, golden, tmp_path):
        name = "model.layers.1.mlp.gate.weight"

        def to_ints(tensors):
            tensors[name] = tensors[name].mul(100).to(torch.int32)

        odd = damaged(golden, tmp_path / "c", to_ints)
        verdict = lingconv.verify(golden, odd)
        assert "is stored as i32 and bf16" in str(verdict.findings[0])
        with pytest.raises(CheckpointError, match=r"gate\.weight: i32 cannot be read"):
            lingconv.forward(odd)

    def test_a_record_excuses_no_other_hole_in_the_source(self, golden, tmp_path):
        lingconv.convert(golden, tmp_path / "out", ConvertOptions(mtp="drop"))
        holed = damaged(golden, tmp_path / "c", lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(CheckpointError):
            lingconv.verify(holed, tmp_path / "out")

    def test_a_hostile_record_means_nothing(self, golden, tmp_path):
        lingconv.convert(golden, tmp_path / "out")
        for options in ([], {"mtp": ["x"], "drop": 7}, {"mtp": "all", "drop": [1, None]}):
            record = tmp_path / "out" / "lingconv.json"
            edit_json(record, lambda value, o=options: value.update(options=o))
            assert lingconv.verify(golden, tmp_path / "out", VerifyOptions(level="bytes")).ok

    def test_words_that_mean_nothing(self, golden):
        for wrong in ({"level": "deep"}, {"mtp": "some"}):
            with pytest.raises(UsageError):
                lingconv.verify(golden, golden, VerifyOptions(**wrong))

    def test_dropped_tensors_of_the_source_are_known_from_the_record(self, golden, tmp_path):
        extra = damaged(
            golden, tmp_path / "extra", lambda tensors: tensors.update(extra=torch.ones(3))
        )
        lingconv.convert(extra, tmp_path / "out", ConvertOptions(drop=("extra",)))
        assert lingconv.verify(extra, tmp_path / "out").ok
        with pytest.raises(CheckpointError):
            lingconv.verify(extra, golden)

    def test_mtp_may_be_dropped_on_purpose_without_a_record(self, golden, tmp_path):
        lingconv.convert(golden, tmp_path / "out", ConvertOptions(mtp="drop"))
        (tmp_path / "out" / "lingconv.json").unlink()
        assert not lingconv.verify(golden, tmp_path / "out").ok
        assert lingconv.verify(golden, tmp_path / "out", VerifyOptions(mtp="drop")).ok


DOWN = "model.layers.1.mlp.experts.0.down_proj.weight"
FP8_SCALES = {
    "f32": Fp8Options(),
    "ue8m0": Fp8Options(scale="ue8m0"),
    "e8m0": Fp8Options(scale="ue8m0", scale_dtype="e8m0"),
    "ct": Fp8Options(dialect="compressed-tensors"),
    "channel": Fp8Options(scheme="channel"),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("value", [1e-38, 1e-40, 3e38])
@pytest.mark.parametrize("name", FP8_SCALES)
def test_blocks_at_the_ends_of_bf16(name, value, golden, tmp_path):
    """What is written of them is right: scales that vanish, that are subnormal, that are huge."""
    shutil.copytree(golden, tmp_path / "source")
    rewrite(tmp_path / "source", lambda held: held[DOWN][:128, :128].fill_(value))
    options = ConvertOptions(dtype="fp8", fp8=FP8_SCALES[name])
    lingconv.convert(tmp_path / "source", tmp_path / "out", options)
    tensors_only = VerifyOptions(level="tensors")
    verdict = lingconv.verify(tmp_path / "source", tmp_path / "out", tensors_only)
    assert verdict.ok, verdict.findings


class TestNonfinite:
    """NaN and Inf that are copied: SRC is broken, and so is DST."""

    BIAS, EMBEDDING = "model.layers.1.mlp.gate.expert_bias", "model.word_embeddings.weight"

    @pytest.fixture
    def source(self, golden, tmp_path):
        def spoil(held):
            held[self.BIAS][2] = math.nan
            held[self.EMBEDDING][7, 3:6] = math.inf

        shutil.copytree(golden, tmp_path / "source")
        rewrite(tmp_path / "source", spoil)
        return tmp_path / "source"

    @pytest.mark.parametrize("options", [
        ConvertOptions(), ConvertOptions(dtype="fp8"), ConvertOptions(layout="megatron"),
        ConvertOptions(layout="hf-merged"),
    ])  # fmt: skip
    def test_they_are_named(self, source, tmp_path, options):
        lingconv.convert(source, tmp_path / "out", options)
        found = lingconv.verify(source, tmp_path / "out", VerifyOptions(level="tensors")).findings
        assert [(finding.tensor, finding.message) for finding in found] == [
            ("embedding", "3 of 131,072 elements are NaN or Inf, in SRC already"),
            ("layers.1.expert_bias", "1 of 8 elements are NaN or Inf, in SRC already"),
        ]

    def test_where_they_were_allowed_they_are_a_warning(self, source, tmp_path):
        lingconv.convert(source, tmp_path / "out", ConvertOptions(allow_nonfinite=True))
        verdict = lingconv.verify(source, tmp_path / "out", VerifyOptions(level="tensors"))
        assert verdict.ok
        assert sum("in SRC already" in fault.message for fault in verdict.warnings) == 2


# The kernel ---------------------------------------------------------------------------------------


def bf16(values):
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    block=st.tuples(st.integers(1, 16), st.integers(1, 33)),
    first_row=st.integers(0, 15),
    kinds=st.tuples(st.booleans(), st.booleans()),
    spoiled=st.lists(st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan]), max_size=5),
    seed=st.integers(0, 1000),
)
def test_the_kernel_counts_what_numpy_counts(rows, cols, block, first_row, kinds, spoiled, seed):
    rng = np.random.default_rng(seed)
    first_row %= block[0]
    left = rng.standard_normal((rows, cols)).astype(np.float32)
    right = left + rng.standard_normal((rows, cols)).astype(np.float32) * np.float32(0.05)
    for value in spoiled:
        for side in (left, right):
            side[rng.integers(rows), rng.integers(cols)] = value
    stored = [bf16(side) if narrow else side for side, narrow in zip((left, right), kinds)]  # noqa: B905
    a, b = (
        (side.astype(np.uint32) << 16).view(np.float32) if side.dtype == np.uint16 else side
        for side in stored
    )
    shape = -(-(first_row + rows) // block[0]), -(-cols // block[1])
    scale_grid = rng.uniform(0.5, 2, shape).astype(np.float32)
    sums = kernel.new_sums(*shape)
    kernel.compare(*stored, *block, first_row, 0.03, 0.01, 1.5, scale_grid, sums)
    for i in range(shape[0]):
        for j in range(shape[1]):
            where = (
                slice(max(0, i * block[0] - first_row), max(0, (i + 1) * block[0] - first_row)),
                slice(j * block[1], (j + 1) * block[1]),
            )
            expected = reference_sums(a[where], b[where], scale_grid[i, j])
            np.testing.assert_allclose(sums[i, j], expected, rtol=2e-6, atol=1e-6)


def test_the_kernel_decodes_every_code_with_its_scale():
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    scale_grid = np.array([[0.37], [3.0]], np.float32)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy() * scale_grid
    sums = kernel.new_sums(2, 1)
    kernel.compare(values, codes, 1, 128, 0, 0.0, 0.0, 500.0, scale_grid, sums)
    assert sums[:, 0, kernel.NOISE].tolist() == [0, 0]
    assert sums[:, 0, kernel.NONFINITE].tolist() == [0, 0]
    expected = np.nansum(values.astype(np.float64) ** 2, axis=1)
    np.testing.assert_allclose(sums[:, 0, kernel.SIGNAL], expected, rtol=1e-6)


def reference_sums(a, b, scale):
    good = np.isfinite(a) & np.isfinite(b)
    same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
    x, y = (np.where(good, side, 0).astype(np.float64) for side in (a, b))
    gap = np.abs(np.where(good, a, 0) - np.where(good, b, 0))  # float32, as the kernel has it
    allowed = np.float32(0.03) * np.abs(np.where(good, a, 0)) + np.float32(0.01) * scale
    return [
        (x * x).sum(),
        (x * y).sum(),
        ((x - y) ** 2).sum(),
        gap.max(initial=0),
        np.abs(x).max(initial=0),
        (good & (gap > allowed)).sum(),
        ((np.abs(a) > 0) & (b == 0)).sum(),
        (np.abs(a) > np.float32(1.5) * scale).sum(),
        (~good & ~same).sum(),
        (~good & same).sum(),
    ]


class TestScales:
    FP8 = Fp8(128, 128, "_scale_inv", DType.F32)
    UE8M0 = Fp8(128, 128, "_scale_inv", DType.F32, power_of_two=True)

    def check(self, scale, peak, encoding=FP8):
        scales_ = np.full((1, 1), scale, np.float32)
        peaks = None if peak is None else np.full((1, 1), peak, np.float64)
        return scales.check(scales_, peaks, encoding, 5)

    @pytest.mark.parametrize(
        ("scale", "peak"),
        [
            (2.0 / 448, 2.0),
            (float(torch.tensor(2.0 / 448).bfloat16()), 2.0),  # as compressed-tensors rounds it
            (2.0**-7, 2.0),  # the power of two above
            (2.0**-7, 3.5),  # exactly reached: 448 x 2^-7
            (1e-4 / 448, 1e-7),  # clamped, as Ling's converter does
            (1.0, 0.0),  # nothing to scale
            (1.0, 2.0**-150 * 448),  # rounded to zero, and 1 in its place
        ],
    )
    def test_right_ones(self, scale, peak):
        assert self.check(scale, peak)[1:] == (0, 0, 0, None)

    @pytest.mark.parametrize(
        ("scale", "peak"),
        [(2.2 / 448, 2.0), (1.9 / 448, 2.0), (2.0**-8, 2.0), (2.0**-6, 2.0), (117.0, 2.0)],
    )
    def test_unfit_ones_are_named_by_their_place(self, scale, peak):
        counts = self.check(scale, peak)
        assert counts.unfit == 1
        assert counts.example[:2] == (5, 0)
        assert "its weights call for" in counts.example[2]

    def test_labels_are_held_to_the_bits(self):
        assert self.check(0.003, None, self.UE8M0).mislabelled == 1
        assert self.check(2.0**-9, None, self.UE8M0).mislabelled == 0
        assert self.check(2.0**-127, None, self.UE8M0).mislabelled == 0  # E8M0's code 0
        assert self.check(3 * 2.0**-129, None, self.UE8M0).mislabelled == 1
        assert self.check(0.003, None).mislabelled == 0

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
    def test_invalid_ones(self, scale):
        assert self.check(scale, 1.0).invalid == 1

    def test_what_the_reference_quantizer_chooses_fits(self):
        weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * 0.02
        for kind in ({}, {"ue8m0": True}, {"bf16_scale": True}):
            _, chosen = reference_quantize(weight, **kind)
            peaks = np.array(
                [[weight[r : r + 128, c : c + 128].abs().max() for c in (0, 128)]
                 for r in (0, 128, 256)], np.float64,
            )  # fmt: skip
            assert scales.check(chosen.numpy(), peaks, self.FP8, 0).unfit == 0

    def test_octaves(self):
        found = scales.histogram(np.array([[1.0, 1.5, 0.25, 0.0, np.nan, 2.0]], np.float32))
        assert found == {0: 2, -2: 1, 1: 1}


def test_logit_metrics_are_llama_cpps():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 5, 11, generator=generator)
    q = p + 0.3 * torch.randn(2, 5, 11, generator=generator)
    ids = torch.randint(11, (2, 5), generator=generator)
    found = compare_logits(p, q, ids)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kld = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert found.mean_kld == pytest.approx(kld.mean().item())
    assert found.max_kld == pytest.approx(kld.max().item())
    assert found.median_kld == pytest.approx(np.quantile(kld.numpy(), 0.5))
    assert found.kld_990 == pytest.approx(np.quantile(kld.numpy(), 0.99))
    assert found.kld_999 == pytest.approx(np.quantile(kld.numpy(), 0.999))
    following = ids[:, 1:, None]
    dp = (log_q.exp() - log_p.exp())[:, :-1].gather(-1, following)
    assert found.rms_dp == pytest.approx(dp.square().mean().sqrt().item())
    assert found.same_top_p == (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found.per_position == pytest.approx(kld.mean(0).tolist())
    assert compare_logits(p, p, ids).max_kld == 0


class TestCommand:
    def invoke(self, *arguments):
        return CliRunner().invoke(app, [*map(str, arguments)])

    def test_yes_is_0_and_no_is_1(self, golden, golden_block, tmp_path):
        done = self.invoke("verify", golden, golden_block)
        assert done.exit_code == 0
        assert done.stdout.startswith("YES, proven")
        broken = damaged(golden, tmp_path / "c", lambda t: t["model.norm.weight"].mul_(2))
        done = self.invoke("verify", golden, broken)
        assert done.exit_code == 1
        lines = done.stdout.splitlines()
        assert lines[0].startswith("NO, ")
        assert "norm" in lines[1]
        assert self.invoke("verify", golden, broken, "-q").stdout == "no\n"

    def test_json_has_every_figure_and_no_nan(self, golden, golden_block):
        done = self.invoke("verify", golden, golden_block, "--json")
        value = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(word))
        assert value["schema"] == "lingconv.verify/1"
        assert value["ok"] is True
        assert len(value["tensors"]) == 92
        assert {"mean_kld", "rms_dp", "same_top_p"} <= value["forward"]["logits"].keys()
        assert value["thresholds"] == {"min_cosine": 0.9, "max_mean_kld": 0.15}

    @pytest.mark.parametrize("command", [("convert", "--dtype", "bf16"), ("quantize",)])
    def test_conversions_prove_themselves(self, command, golden, tmp_path):
        name, *rest = command
        arguments = (name, golden, tmp_path / "out", *rest, "--verify")
        done = self.invoke(*arguments)
        assert done.exit_code == 0
        assert "YES, proven" in done.stdout
        value = json.loads(self.invoke(*arguments, "--json").stdout)
        assert value["verdict"]["ok"] is True
        rewrite(tmp_path / "out", lambda tensors: tensors["model.norm.weight"].mul_(2))
        state = tmp_path / "out" / ".lingconv"
        shutil.rmtree(state)
        done = self.invoke("verify", golden, tmp_path / "out", "--level", "tensors")
        assert done.exit_code == 1

    def test_the_report_needs_matplotlib(self, golden, monkeypatch):
        monkeypatch.setattr("lingconv.verification.reports.page.find_spec", lambda name: None)
        done = self.invoke("verify", golden, golden, "--report", "r.html")
        assert isinstance(done.exception, UsageError)
        assert "lingconv[report]" in done.exception.hint


_CHROMIUM = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    " disable-component-update disable-sync hide-scrollbars"
)


@pytest.fixture(scope="module")
def verdict():
    return lingconv.verify(DATA / "tiny-ling-v2", DATA / "tiny-ling-v2-fp8-block-ct")


class TestReport:
    def test_it_stands_alone(self, verdict):
        page = render(verdict)
        assert page.count("<svg") == 7
        assert "<script" not in page
        linked = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert all(link.startswith(("#", "data:image/png")) for link in linked)
        ids = re.findall(r'\bid="([^"]+)"', page)
        assert len(set(ids)) == len(ids) > 100
        assert "prefers-color-scheme: dark" in page
        assert "#010203" not in page
        assert verdict.findings == ()
        assert "Yes: as close as FP8 can be" in page

    def test_the_same_verdict_gives_the_same_bytes(self, verdict):
        assert render(verdict) == render(verdict)

    def test_names_are_escaped(self, golden, tmp_path):
        nasty = tmp_path / "<img src=x onerror=alert(1)>"
        shutil.copytree(golden, nasty)
        rewrite(nasty, lambda tensors: tensors["model.norm.weight"].mul_(2))
        page = render(lingconv.verify(golden, nasty))
        assert "<img" not in page
        assert "No: " in page
        assert "elements differ, none may" in page

    def test_tensors_only(self, golden, golden_channel):
        page = render(lingconv.verify(golden, golden_channel, VerifyOptions(level="tensors")))
        assert page.count("<svg") == 4
        assert "Router flips" not in page

    @pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
    @pytest.mark.parametrize("width", [1200, 400])
    def test_a_browser_shows_it(self, verdict, width, tmp_path):
        page, shot = tmp_path / "report.html", tmp_path / "shot.png"
        lingconv.api.write_report(verdict, page)
        flags = [f"--{word}" for word in _CHROMIUM.split()]
        subprocess.run(
            ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}",
             f"--window-size={width},900", f"--screenshot={shot}", page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        import matplotlib.image as image

        pixels = image.imread(shot)
        assert pixels.shape[1] == width
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
