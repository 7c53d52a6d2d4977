"""Fixtures: the golden checkpoints, a clean environment, checkpoints to break."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Neither how long an example takes nor how long it is looked for is a result.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep what is staged out of the user's cache, where an earlier run may have left something."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Keep a developer's shell from changing a result."""
    for name in [*os.environ]:
        if name.startswith(("LINGCONV_", "HF_")) or name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def golden():
    """The tiny Ling 2.0 in BF16: 1 dense, 1 MoE and 1 MTP layer, 3 shards."""
    return DATA / "tiny-ling-v2"


@pytest.fixture(scope="session")
def golden_channel():
    """The same, quantized by llm-compressor with scheme FP8_DYNAMIC."""
    return DATA / "tiny-ling-v2-fp8-channel"


@pytest.fixture(scope="session")
def golden_block():
    """The same, quantized by llm-compressor with scheme FP8_BLOCK."""
    return DATA / "tiny-ling-v2-fp8-block-ct"
