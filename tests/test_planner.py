"""Plans are complete, exact, and survive JSON."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingconv import CheckpointError, ConvertOptions, Fp8Options, Plan, UsageError
from lingconv.api import open_model, plan, synthetic_model
from lingconv.planner.planner import build_plan
from lingconv.plans.lowering import STRIP_BYTES, CopyStrip, lower, strip_memory
from tests.support import header_of

options = st.builds(
    ConvertOptions,
    dtype=st.sampled_from(["", "bf16", "f16", "f32"]),
    mtp=st.sampled_from(["keep", "drop", "only"]),
    max_shard_bytes=st.integers(1, 8_000_000),
) | st.builds(
    ConvertOptions,
    dtype=st.just("fp8"),
    fp8=st.builds(
        Fp8Options,
        scheme=st.sampled_from(["block", "channel"]),
        dialect=st.just("compressed-tensors"),
        scale=st.sampled_from(["f32", "ue8m0", "ling"]),
        ignore=st.sampled_from([(), ("lm_head", "re:.*experts.*up_proj"), ("*.attention.dense",)]),
    ),
    mtp=st.sampled_from(["keep", "drop", "only"]),
    max_shard_bytes=st.integers(1, 8_000_000),
)


@pytest.fixture(scope="module")
def model(golden):
    return open_model(golden)


@settings(max_examples=60)
@given(options=options)
def test_every_byte_is_planned_once_and_plans_survive_json(model, options):
    if options.mtp == "only" and options.fp8.ignore:
        options = ConvertOptions(options.layout, options.dtype, mtp="only")
    if options.mtp == "only" and options.dtype == "fp8":
        options = ConvertOptions(dtype="fp8", mtp="only")
    built = build_plan(model, options)
    again = Plan.from_json(json.loads(json.dumps(built.to_json())))
    assert again == built
    assert again.digest == built.digest
    for file in built.files:
        covered = sorted(_ranges(file))
        position = len(header_of(file))
        for start, stop in covered:
            assert start == position
            position = stop
        assert position == file.nbytes
    sources = [s for t in built.transfers() for s in t.segments]
    names = [n for s in sources for n in s.source.encoding.names(s.source.name)]
    dropped = [item.name for item in built.dropped]
    assert sorted([*names, *dropped]) == sorted(model.checkpoint.tensors)


def _ranges(file):
    """Yield the bytes that each strip of a file fills."""
    for strip in lower(file):
        assert strip_memory(strip) <= 4 * STRIP_BYTES
        if isinstance(strip, CopyStrip):
            yield strip.offset, strip.offset + strip.nbytes
            continue
        target = strip.transfer.target
        for spec, extent in zip(
            target.encoding.tensors(target.name, target.shape), target.extents, strict=True
        ):
            rows_per_unit = -(-strip.transfer.rows // spec.shape[0])
            unit = extent.nbytes // spec.shape[0]
            first, last = strip.first // rows_per_unit, -(-strip.last // rows_per_unit)
            if first < last:
                yield extent.offset + first * unit, extent.offset + last * unit


def test_shards_hold_at_most_what_was_asked(model):
    built = build_plan(model, ConvertOptions(max_shard_bytes=500_000))
    for file in built.files:
        data = sum(spec.nbytes for spec in file.tensors)
        assert data <= 500_000 or len(file.tensors) == 1
    assert [file.name for file in built.files][:2] == [
        f"model-0000{n}-of-{len(built.files):05d}.safetensors" for n in (1, 2)
    ]


def test_a_weight_and_its_scale_share_a_shard(model):
    built = build_plan(model, ConvertOptions(dtype="fp8", max_shard_bytes=300_000))
    for transfer in built.transfers():
        assert len({extent.file for extent in transfer.target.extents}) == 1


def test_the_full_trillion_is_planned_exactly():
    model = synthetic_model("ling-1t")
    built = build_plan(model, ConvertOptions(dtype="fp8"))
    assert built.total_parameters == 999_705_328_640
    assert built.read_bytes == 1_999_410_696_192
    assert built.encodings["fp8-block f32 scales"] == 58_768
    # Facts: about 1,002.68 GB as F8 blocks.
    assert abs(built.tensor_bytes - 1_002.68e9) < 0.01e9


def test_digest_ignores_time_stamps_and_notices_everything_else(model, golden):
    built = build_plan(model, ConvertOptions())
    assert build_plan(open_model(golden), ConvertOptions()).digest == built.digest
    others = [
        ConvertOptions(max_shard_bytes=1_000_000),
        ConvertOptions(dtype="f32"),
        ConvertOptions(dtype="fp8"),
        ConvertOptions(dtype="fp8", fp8=Fp8Options(scale="ue8m0")),
        ConvertOptions(dtype="fp8", fp8=Fp8Options(scale="ling")),
    ]
    digests = {build_plan(model, other).digest for other in others}
    assert len({*digests, built.digest}) == len(others) + 1


def test_quantized_modules_are_listed_by_full_path(model):
    built = build_plan(model, ConvertOptions(dtype="fp8", fp8=Fp8Options(ignore=("*.dense",))))
    assert built.config["quantization_config"]["modules_to_not_convert"] == [
        "model.layers.0.attention.dense",
        "model.layers.1.attention.dense",
        "model.layers.1.mlp.gate",
        "lm_head",
        "model.layers.2.eh_proj",
        "model.layers.2.attention.dense",
        "model.layers.2.mlp.gate",
    ]


def test_unknown_config_keys_stay_in_order(model):
    keys = list(model.checkpoint.config)
    assert list(build_plan(model, ConvertOptions(dtype="f16")).config) == keys
    assert build_plan(model, ConvertOptions(dtype="f16")).config["torch_dtype"] == "float16"
    assert list(build_plan(model, ConvertOptions(dtype="fp8")).config) == [
        *keys,
        "quantization_config",
    ]


def fp8(**options):
    return ConvertOptions(dtype="fp8", fp8=Fp8Options(**options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (fp8(ignore=("lm_haed",)), "matches nothing"),
        (fp8(scale_rules=(("re:.*norm", "ue8m0"),)), "matches nothing"),
        (ConvertOptions(drop=("model.*",)), "matches nothing"),
        (fp8(ignore=("re:(",)), "regular expression"),
        (fp8(scale="e5m3"), "no scale policy"),
        (fp8(scheme="channel", dialect="fp8"), "per-channel"),
        (fp8(scale_dtype="e8m0"), "powers of two"),
        (fp8(scale="ue8m0", scale_dtype="e8m0", dialect="compressed-tensors"), "fp8` dialect"),
        (fp8(scheme="tensor"), "`scheme` is"),
        (ConvertOptions(fp8=Fp8Options(scale="ue8m0")), "are for FP8"),
        (ConvertOptions(dtype="int3"), "`dtype` is"),
        (ConvertOptions(layout="gguff"), "`layout` is"),
        (ConvertOptions(max_shard_bytes=0), "positive"),
    ],
)
def test_requests_that_cannot_be_meant(model, options, says):
    with pytest.raises(UsageError, match=says):
        build_plan(model, options)


def test_fp8_is_not_rounded_twice_unasked(golden_block):
    ue8m0 = ConvertOptions(dtype="fp8", fp8=Fp8Options(scale="ue8m0"))
    with pytest.raises(UsageError, match="round it twice"):
        plan(golden_block, ue8m0)
    asked = ConvertOptions(dtype="fp8", fp8=ue8m0.fp8, allow_requantize=True)
    assert plan(golden_block, asked).encodings["fp8-block f32 ue8m0 scales"] == 63


def test_a_dialect_may_change_without_touching_the_codes(golden_block):
    renamed = ConvertOptions(dtype="fp8", fp8=Fp8Options(scale_dtype="bf16"))
    built = plan(golden_block, renamed)
    assert all(transfer.copies for transfer in built.transfers())
    assert built.config["quantization_config"]["quant_method"] == "fp8"


def test_mtp_drop_excuses_missing_mtp_tensors(tmp_path, golden):
    from tests.support import copy_checkpoint, rewrite

    source = copy_checkpoint(golden, tmp_path / "s")

    def without_mtp(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.2.")]:
            del tensors[name]

    rewrite(source, without_mtp)
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert "`mtp=drop`" in caught.value.hint
    built = plan(source, ConvertOptions(mtp="drop"))
    assert built.config["num_nextn_predict_layers"] == 0
    assert len(list(built.transfers())) == 47
