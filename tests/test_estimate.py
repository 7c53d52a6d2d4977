"""What a plan is going to take: checked arithmetic, and a calibration that leaves nothing."""

import json
from dataclasses import replace

import pytest

import lingconv
from lingconv import ConvertOptions, GgufOptions, UsageError
from lingconv.api import open_model, synthetic_model
from lingconv.execution.estimate import Profile, by_kind, calibrate, estimate, read_profile
from lingconv.planner.planner import build_plan
from tests.support import tree_digest
from tests.test_cli import run

FP8 = ConvertOptions(dtype="fp8", max_shard_bytes=300_000)
RATES = {
    "copy bf16": 2e9,
    "copy f32": 2e9,
    "bf16 -> fp8-block f32 scales": 1e9,
}
PROFILE = Profile(RATES, start_s=1.0, rss_bytes=200 << 20)


def test_every_byte_counts_once(golden):
    plan = lingconv.plan(golden, FP8)
    kinds = by_kind(plan)
    assert set(kinds) == set(RATES)
    assert sum(nbytes for nbytes, _ in kinds.values()) == plan.tensor_bytes
    found = estimate(plan, PROFILE)
    expected = sum(nbytes / RATES[kind] for kind, (nbytes, _) in kinds.items())
    assert found.convert_s == pytest.approx(expected)
    assert found.seconds == pytest.approx(1.0 + expected)
    assert found.rss_bytes == PROFILE.rss_bytes


def test_cost_grows_with_bytes_and_memory_does_not():
    """From eight layers of Ling-1T to all eighty: each layer costs the same, memory stays."""
    found = {}
    for layers in (8, 16, 80):
        plan = build_plan(synthetic_model("ling-1t", layers=layers), ConvertOptions(dtype="fp8"))
        found[layers] = estimate(plan, PROFILE)
    per_layer = (found[16].convert_s - found[8].convert_s) / 8
    assert found[80].convert_s - found[16].convert_s == pytest.approx(64 * per_layer, rel=1e-3)
    assert len({each.rss_bytes for each in found.values()}) == 1


def test_machines_share_the_work_but_not_a_file(golden):
    plan = lingconv.plan(golden, FP8)
    alone = estimate(plan, PROFILE).convert_s
    assert estimate(plan, PROFILE, machines=4).convert_s == pytest.approx(alone / 4)
    largest = max(file.nbytes for file in plan.files) / sum(file.nbytes for file in plan.files)
    assert estimate(plan, PROFILE, machines=1000).convert_s == pytest.approx(alone * largest)


def test_the_slower_of_network_and_work_counts(golden):
    plan = lingconv.plan(golden, FP8)
    slow = estimate(plan, PROFILE, network_bytes_per_s=1e5, writes_far=True)
    assert slow.network_s == pytest.approx(plan.write_bytes / 1e5)
    assert slow.seconds == pytest.approx(1.0 + slow.network_s)
    both = estimate(plan, PROFILE, network_bytes_per_s=1e5, writes_far=True, reads_far=True)
    assert both.network_s == pytest.approx(plan.read_bytes / 1e5)  # in and out at the same time
    fast = estimate(plan, PROFILE, network_bytes_per_s=1e12, reads_far=True, machines=2)
    assert fast.seconds == pytest.approx(1.0 + fast.convert_s)
    with pytest.raises(UsageError, match="sent over a network") as caught:
        estimate(plan, PROFILE, writes_far=True)
    assert "network_bytes_per_s=" in caught.value.hint


def test_profiles(golden, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE.to_json()))
    assert read_profile(path) == PROFILE
    for text in ("", "[]", "{}", '{"schema": "other"}', '{"schema": "lingconv.profile/1"}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="is no profile"):
            read_profile(path)
    less = replace(PROFILE, rates={"copy bf16": 1e9})
    with pytest.raises(UsageError, match="no rate for `bf16 -> fp8"):
        estimate(lingconv.plan(golden, FP8), less)


@pytest.mark.parametrize(
    "options",
    [
        FP8,
        ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="q4_k_m")),
        ConvertOptions(layout="megatron"),
        ConvertOptions(layout="hf-merged", merged="automodel"),
    ],
)
def test_calibrating_knows_every_way_and_leaves_nothing(golden, tmp_path, options, monkeypatch):
    monkeypatch.setattr("lingconv.execution.estimate.SAMPLE_BYTES", 200_000)
    monkeypatch.setattr("lingconv.execution.estimate._SMALL_BYTES", 50_000)
    model = open_model(golden)
    plan = build_plan(model, options)
    (tmp_path / "disk").mkdir()
    profile = calibrate(
        plan, [model.checkpoint.storage], tmp_path / "disk/out", lingconv.Resources()
    )
    assert set(profile.rates) == set(by_kind(plan))
    assert all(rate > 0 for rate in profile.rates.values())
    assert tree_digest(tmp_path) == {}
    assert estimate(plan, profile).seconds > 0


def test_the_command(golden, tmp_path):
    profile = tmp_path / "profile.json"
    words = ["plan", golden, tmp_path / "out", "--dtype", "fp8", "--profile", profile]
    found = json.loads(run(*words, "--json")[0])["estimate"]
    assert found["machines"] == 1
    again, _ = run(*words, "--machines", "16", "--network", "10Gbit")
    assert "on each of 16 machines" in again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json"]
