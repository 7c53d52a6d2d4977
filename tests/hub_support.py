"""A Hub on this machine for a test or a program: the real client is pointed at it, and hurries."""

import os
import time
from contextlib import contextmanager
from types import SimpleNamespace

from tests.hub_server import TOKEN

# The client's pauses, a hundred times shorter.
HURRIED = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100))


def point_client_at(monkeypatch, endpoint, home, token=TOKEN):
    """Let huggingface_hub, imported already, talk to `endpoint` and keep its files in `home`."""
    import huggingface_hub
    from huggingface_hub import constants

    import lingconv.storage.hub.client
    import lingconv.storage.hub.repository

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(lingconv.storage.hub.client, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(lingconv.storage.hub.repository, "LONGEST_TURN_S", 0.001)
    monkeypatch.setattr("huggingface_hub.utils._http.time", HURRIED)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    huggingface_hub.close_session()


def environment(endpoint, home, token=TOKEN):
    """Return what a process needs in its environment to talk to `endpoint`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LINGCONV_"))}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(home),
        **({"HF_TOKEN": token} if token else {}),
    }


# Files become smaller, or fewer, by these alone.
_LESS = ("unlink", "remove", "rename", "replace", "truncate", "ftruncate")


@contextmanager
def watched(measure):
    """Measure what lies on disk before each call that makes it less, and at the end.

    Yields the list of what was found: its largest is the most that there was at any time.
    """
    found, real = [], {name: getattr(os, name) for name in _LESS}

    def measuring(call):
        def measured(*args, **words):
            found.append(measure())
            return call(*args, **words)

        return measured

    for name, call in real.items():
        setattr(os, name, measuring(call))
    try:
        yield found
    finally:
        for name, call in real.items():
            setattr(os, name, call)
        found.append(measure())


def weight_bytes(folder):
    """Return the bytes on disk of all weights below a folder, finished or not."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            if ".safetensors" in name or ".gguf" in name or name.endswith(".incomplete"):
                try:
                    total += os.stat(os.path.join(root, name)).st_size  # noqa: PTH116, PTH118
                except FileNotFoundError:
                    continue
    return total
