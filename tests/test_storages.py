"""What every storage owes: the bytes that were asked for, or an error that names the file."""

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from lingconv.errors import CheckpointError, LingconvError
from tests.kit.storages import CASES, FILES, SECRET, SECRET_NAME

MISSING = ("nothing.safetensors", "sub", "sub/deep/nothing", "config.json/inside")
LEADING_OUT = (
    f"../{SECRET_NAME}",
    f"sub/../../{SECRET_NAME}",
    f"./../{SECRET_NAME}",
    "{outside}",
    f"..\\{SECRET_NAME}",
    "con\0fig.json",
    "config.json\0",
    "..",
    ".",
    "",
)


class Held:
    """A storage that was filled, and the bytes that it is to have."""

    def __init__(self, case, storage, outside):
        self.case, self.storage, self.outside = case, storage, outside
        self.files = dict(FILES)
        if case.makes_its_own:
            self.files = {name: whole(storage, name) for name in storage.files()}

    @property
    def largest(self):
        return max(self.files, key=lambda name: len(self.files[name]))

    @property
    def blobs(self):
        """Return the weight files: what is opened in earnest."""
        return [name for name, data in self.files.items() if len(data) >= 10_000]


def whole(storage, name):
    """Return all bytes of a file, by one read of an open file where `read` has none."""
    size = storage.files()[name].size
    data = storage.read(name)
    if len(data) == size:
        return data
    with closing(storage.open(name)) as blob:
        return read(blob, 0, size)


def read(blob, offset, count):
    buffer = bytearray(b"\xaa" * count)
    blob.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def asked(storage, ask, name):
    """Return what a storage answers of a file: its stat, its bytes, or its bytes once opened."""
    if ask == "open":
        with closing(storage.open(name)) as blob:
            return read(blob, 0, len(SECRET))
    return getattr(storage, ask)(name)


@pytest.fixture(scope="module", params=CASES, ids=str)
def held(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("storage")
    with pytest.MonkeyPatch.context() as patch, request.param.make(FILES, folder, patch) as storage:
        yield Held(request.param, storage, folder / SECRET_NAME)


@contextmanager
def few_calls(limit=10_000):
    """Break off what goes on and on."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        ours = event == "call" and frame.f_globals.get("__name__", "").startswith("lingconv.")
        calls += ours
        if ours and calls > limit:  # not amid the standard library, which may hold a lock
            sys.setprofile(None)
            raise AssertionError(f"more than {limit:,} calls")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def ranges(held, name, seed=0, count=40):
    """Return ranges of a file: whole, at both ends, around blocks, and anywhere."""
    size = len(held.files[name])
    chosen = random.Random(seed)
    found = [(0, size), (0, 1), (size - 1, 1), (size, 0), (0, 0)]
    found += [(4095, 2), (4096, 4096), (8191, 2), (0, 4097)]
    for _ in range(count):
        offset = chosen.randrange(size)
        longest = chosen.choice((64, 999, 1001, 5000, size))
        found.append((offset, min(chosen.randrange(longest), size - offset)))
    return [(offset, count) for offset, count in found if offset + count <= size]


# Names and sizes ----------------------------------------------------------------------------------


def test_files_are_listed_with_their_sizes(held):
    assert {name: stat.size for name, stat in held.storage.files().items()} == {
        name: len(data) for name, data in held.files.items()
    }
    assert held.storage.uri
    assert held.storage.parallel_reads >= 1


def test_stat_says_what_the_listing_says(held):
    for name, stat in held.storage.files().items():
        assert held.storage.stat(name) == stat, name


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("ask", ["stat", "read", "open"])
def test_what_is_not_there_is_an_error_that_names_it(held, name, ask):
    with pytest.raises(CheckpointError) as caught:
        asked(held.storage, ask, name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", LEADING_OUT)
@pytest.mark.parametrize("ask", ["stat", "read", "open"])
def test_no_name_leads_out(held, name, ask):
    name = name.format(outside=held.outside)
    assert name not in held.storage.files()
    found = []
    with pytest.raises(LingconvError) as caught:
        found.append(asked(held.storage, ask, name))
    assert SECRET not in found
    assert 2 <= caught.value.exit_code <= 7


# read ---------------------------------------------------------------------------------------------


def test_read_returns_the_range_that_was_asked_for(held):
    for name, data in held.files.items():
        size = len(data)
        for offset, count in ((0, None), (0, 8), (3, 5), (size // 2, None), (size - 1, 1)):
            if offset >= 0:
                end = None if count is None else offset + count
                assert held.storage.read(name, offset, count) == data[offset:end], name
        assert held.storage.read(name) == data


def test_read_returns_what_is_left_where_a_file_ends(held):
    for name, data in held.files.items():
        size = len(data)
        assert held.storage.read(name, 0, size + 1000) == data
        assert held.storage.read(name, max(size - 3, 0), 1000) == data[-3:]
        assert held.storage.read(name, size, 10) == b""
        assert held.storage.read(name, size + 5000, 10) == b""
        assert held.storage.read(name, size + 5000) == b""
        assert held.storage.read(name, 0, 0) == b""


# Open files ---------------------------------------------------------------------------------------


def test_open_files_have_the_bytes(held):
    for name in held.blobs:
        data = held.files[name]
        with closing(held.storage.open(name)) as blob:
            for offset, count in ranges(held, name):
                assert read(blob, offset, count) == data[offset : offset + count], (offset, count)


def test_every_file_that_is_listed_can_be_opened(held):
    for name, data in held.files.items():
        with closing(held.storage.open(name)) as blob:
            assert read(blob, 0, len(data)) == data, name


def test_a_descriptor_is_that_of_the_file(held):
    for name in held.blobs:
        with closing(held.storage.open(name)) as blob:
            if blob.descriptor is not None:
                assert os.pread(blob.descriptor, 4096, 4096) == held.files[name][4096:8192]


@pytest.mark.parametrize("count", [4, 512, 20_000])
@pytest.mark.parametrize("behind", [False, True])
def test_beyond_the_end_is_an_error_that_names_the_file(held, count, behind):
    for name in held.blobs:
        size = len(held.files[name])
        offset = size + 4096 if behind else size - count // 2
        with closing(held.storage.open(name)) as blob:
            with pytest.raises(CheckpointError) as caught, few_calls():
                read(blob, offset, count)
            assert name.rpartition("/")[2] in str(caught.value)
            assert read(blob, 0, 2048) == held.files[name][:2048]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_expected_has_the_bytes(held, seed):
    """Announced in order, read in any order, some of it twice and some of it never."""
    chosen = random.Random(seed)
    for name in held.blobs:
        data = held.files[name]
        step = chosen.choice((1024, 4096, 12_288))
        parts = [(at, min(step, len(data) - at)) for at in range(0, len(data), step)]
        with closing(held.storage.open(name)) as blob:
            for offset, count in parts:
                blob.expect(offset, count)
            chosen.shuffle(parts)
            for offset, count in (*parts[: len(parts) * 2 // 3], *parts[:3]):
                assert read(blob, offset, count) == data[offset : offset + count]


@pytest.mark.parametrize("announced", [False, True])
def test_many_threads_read_one_open_file(held, announced):
    name = held.largest
    data = held.files[name]
    with closing(held.storage.open(name)) as blob, ThreadPoolExecutor(8) as threads:

        def right(place):
            offset, count = place
            if announced:
                blob.expect(offset, count)
            return read(blob, offset, count) == data[offset : offset + count]

        places = ranges(held, name, seed=9, count=150)
        assert all(threads.map(right, places))


def test_many_threads_open_and_read_all_files(held):
    def right(number):
        name = held.blobs[number % len(held.blobs)]
        offset, count = ranges(held, name, seed=number, count=1)[-1]
        with closing(held.storage.open(name)) as blob:
            return read(blob, offset, count) == held.files[name][offset : offset + count]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(right, range(64)))


def test_what_is_released_can_be_read_again(held):
    """The last test: what was fetched ahead is gone after it."""
    for name in held.blobs:
        held.storage.release(name)
        held.storage.release(name)
    for name in held.blobs:
        with closing(held.storage.open(name)) as blob:
            assert read(blob, 0, len(held.files[name])) == held.files[name]
        assert held.storage.stat(name).size == len(held.files[name])
