"""Storages under test: a line for each, which says how it is filled.

A new storage is one more `StorageCase` in `CASES`; `tests/test_storages.py` has the tests.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import fsspec
import numpy as np
import pytest

from lingconv.checkpoint.synthetic import SynthStorage
from lingconv.model.family_file import load_families
from lingconv.model.layout import HF
from lingconv.storage import Storage, byte_ranges
from lingconv.storage.hub.address import parse_address
from lingconv.storage.hub.download import Downloader
from lingconv.storage.hub.storage import HubStorage
from lingconv.storage.local import LocalStorage
from lingconv.storage.object_store import ObjectStorage
from lingconv.storage.overlay import Overlay
from tests.hub_server import Hub
from tests.hub_support import point_client_at

Files = Mapping[str, bytes]
# What a storage is made of: the files to hold, an empty folder, and what patches the process.
Make = Callable[[Files, Path, pytest.MonkeyPatch], AbstractContextManager[Storage]]


def rubbish(seed: int, count: int) -> bytes:
    return np.random.default_rng(seed).bytes(count)


FILES: Files = MappingProxyType({
    "config.json": b'{"architectures": ["X"]}\n',
    "empty.txt": b"",
    "model-00001-of-00002.safetensors": rubbish(1, 150_001),
    "model-00002-of-00002.safetensors": rubbish(2, 70_000),
    "sub/deep/part.bin": rubbish(3, 12_288),
})  # fmt: skip
# Lies beside what a storage is made of, where names like `../secret.txt` would find it.
SECRET_NAME, SECRET = "secret.txt", b"nobody may read this"


@dataclass(frozen=True, slots=True, eq=False)
class StorageCase:
    """A storage; `makes_its_own` tells that it holds other files than it is given."""

    name: str
    make: Make
    makes_its_own: bool = False

    def __str__(self) -> str:
        return self.name


def write_files(files: Files, folder: Path) -> Path:
    """Write files below `folder/root`, and the secret beside it."""
    for name, data in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / SECRET_NAME).write_bytes(SECRET)
    return folder / "root"


@contextmanager
def local(files: Files, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    yield LocalStorage(write_files(files, folder))


@contextmanager
def overlay(files: Files, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """Some files are real, the smallest ones are made; the folder holds another by their name."""
    made = {name: data for name, data in files.items() if len(data) < 100}
    real = {name: data for name, data in files.items() if name not in made}
    root = write_files({**real, "config.json": b"another", "other.bin": b"not listed"}, folder)
    yield Overlay(LocalStorage(root), set(real), made)


def shorten_ranges(patch: pytest.MonkeyPatch) -> None:
    """Let small files be made of many blocks and requests."""
    patch.setattr(byte_ranges, "SMALL_BYTES", 1000)
    patch.setattr(byte_ranges, "BLOCK_BYTES", 4096)
    patch.setattr(byte_ranges, "REQUEST_BYTES", 50_000)


@contextmanager
def objects(files: Files, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    shorten_ranges(patch)
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pipe({f"/kit/root/{name}": data for name, data in files.items()})
    system.pipe(f"/kit/{SECRET_NAME}", SECRET)
    yield ObjectStorage("memory://kit/root")
    system.store.clear()


@contextmanager
def hub(files: Files, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[HubStorage]:
    shorten_ranges(patch)
    with Hub() as server:
        point_client_at(patch, server.endpoint, folder / "home", token="")
        inside = {f"root/{name}": data for name, data in files.items()}
        server.add("org/kit", {**inside, SECRET_NAME: SECRET})
        yield HubStorage.at(parse_address("hf://org/kit/root"))


@contextmanager
def downloads(files: Files, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """There is room for all files but the largest one, which is read by ranges."""
    with hub(files, folder, patch) as far:
        room = sum(map(len, files.values())) - max(map(len, files.values()))
        order = sorted(files, key=lambda name: len(files[name]))
        downloader = Downloader(far, folder / "fetched", order, room)
        yield downloader
        downloader.close()


@contextmanager
def synthetic(files: Files, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    text = Path(__file__).parents[1] / "data/tiny-ling-v2/config.json"
    config = json.loads(text.read_text())
    family = load_families(None)[0]
    yield SynthStorage(family, family.resolve(config, HF), config, seed=7)


CASES = [
    StorageCase("local", local),
    StorageCase("overlay", overlay),
    StorageCase("objects", objects),
    StorageCase("hub", hub),
    StorageCase("downloads", downloads),
    StorageCase("synthetic", synthetic, makes_its_own=True),
]
