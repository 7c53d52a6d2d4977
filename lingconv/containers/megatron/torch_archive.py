"""torch.save's archive: a zip whose records are stored as they are, so that they can be streamed.

    archive/data.pkl     the objects, with a reference in place of each tensor's elements
    archive/data/KEY     the elements of one storage
    archive/byteorder    little
    archive/version      3

Sources: caffe2/serialize/inline_container.h and torch/serialization.py of PyTorch 2.13 for the
records, APPNOTE.TXT 6.3.9 of PKWARE for the zip. An archive is a file (`*.pt`), or lies with others
in a `.distcp` file. Sizes and offsets beyond 4 GiB take the zip64 fields.
"""

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from lingconv.containers.base import FileBytes
from lingconv.containers.stored_tensor import CutShort, HeaderError
from lingconv.storage import BLOCK_BYTES

PICKLE_NAME = "data.pkl"
_STORED = 0
_ENCRYPTED = 1
_UTF8 = 0x800
_ZIP64 = 0x0001
_PADDING = 0x4246  # "FB", as torch pads
_MAX32 = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16
_MAX_RECORDS = 1_000_000
_MAX_DIRECTORY = 128 << 20  # bytes; a rank of Ling-1T with its optimizer has 30 MB
_MAX_ORDER = 16  # bytes of the record `byteorder`
# A central directory with up to seven records fits, and so does what torch writes before the data.
PEEK_BYTES = 2048

# Reads `count` bytes at `offset` of an archive; fewer at its end.
Read = Callable[[int, int], bytes]


class Entry(NamedTuple):
    """A record of an archive that is read: where its local header is, its size, its CRC-32.

    `name` is the whole one, in the bytes that both headers have.
    """

    name: bytes
    header: int
    nbytes: int
    crc: int


class Elements(NamedTuple):
    """The elements of a storage in an archive, and the CRC-32 that it states, or 0."""

    offset: int
    nbytes: int
    crc: int


def read_directory(read: Read, size: int) -> dict[str, Entry]:
    """Return the records of an archive of `size` bytes, without the folder that all of them are in.

    Raises HeaderError when it is no archive, is cut short, or holds what torch does not write.
    """
    start = max(0, size - PEEK_BYTES)
    tail = read(start, size - start)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < _END.size:
        raise _not_an_archive(read(0, 8))
    count, length, offset, behind = _directory_place(tail, end)
    if count > _MAX_RECORDS or length > _MAX_DIRECTORY:
        raise HeaderError(f"has a directory of {count:,} records in {length:,} bytes")
    if offset + length != start + behind:
        raise HeaderError(f"has a directory that does not end at byte {start + behind:,}")
    inside = offset >= start
    raw = tail[offset - start : offset - start + length] if inside else read(offset, length)
    entries: dict[str, Entry] = {}
    position = 0
    for _ in range(count):
        name, entry, position = _parse_central(raw, position, size)
        if name in entries:
            raise HeaderError(f"holds `{name}` twice")
        entries[name] = entry
    if position != len(raw):
        raise HeaderError("has a directory that is longer than its records")
    _check_apart(entries)
    return entries


def _check_apart(entries: Mapping[str, Entry]) -> None:
    """Raise HeaderError when two records share bytes: torch writes one behind the other."""
    end = 0
    for entry in sorted(entries.values(), key=attrgetter("header")):
        if entry.header < end:
            raise HeaderError(f"holds `{_spelled(entry.name)}` inside of another record")
        end = entry.header + _LOCAL.size + len(entry.name) + entry.nbytes


def _spelled(name: bytes) -> str:
    return name[:200].decode("utf-8", "replace")


def _not_an_archive(head: bytes) -> HeaderError:
    if not head:
        return CutShort("is cut short: it is empty")
    if head.startswith(b"PK"):
        return CutShort("is cut short: the directory at its end is missing")
    if head[:1] == b"\x80":
        return HeaderError(
            "is of torch's format before 1.6, which is not read: save it again with a newer one"
        )
    return HeaderError("is no archive of torch")


def _directory_place(tail: bytes, end: int) -> tuple[int, int, int, int]:
    """Return count, bytes and offset of the directory, and where in `tail` it has to end."""
    _, disk, _, here, count, length, offset, comment = _END.unpack_from(tail, end)
    locator = end - _LOCATOR.size
    if end + _END.size + comment != len(tail):
        raise HeaderError("does not end where its directory says")
    behind = end
    if max(length, offset) == _MAX32 or count == 0xFFFF:
        end64 = locator - _END64.size  # torch writes one right behind the other
        if end64 < 0 or tail[end64 : end64 + 4] != b"PK\x06\x06":
            raise HeaderError("has a damaged zip64 end record")
        *_, here, count, length, offset = _END64.unpack_from(tail, end64)
        behind = end64
    elif tail[max(0, locator) : max(0, locator) + 4] == b"PK\x06\x07":
        behind = locator - _END64.size  # there, and not needed
    if disk or here != count:
        raise HeaderError("is one part of a zip of several")
    return count, length, offset, behind


def _parse_central(raw: bytes, position: int, size: int) -> tuple[str, Entry, int]:
    if len(raw) - position < _CENTRAL.size:
        raise HeaderError("has a directory that is cut short")
    fields = _CENTRAL.unpack_from(raw, position)
    signature, flags, method, packed, nbytes = fields[0], fields[3], fields[4], fields[8], fields[9]
    name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
    first = position + _CENTRAL.size
    own = raw[first : first + name_length]
    extra = raw[first + name_length : first + name_length + extra_length]
    wide = _zip64_fields(extra)
    if nbytes == _MAX32:
        nbytes = next(wide, _MAX32)
    if packed == _MAX32:
        packed = next(wide, _MAX32)
    if header == _MAX32:
        header = next(wide, _MAX32)
    if signature != b"PK\x01\x02" or header + _LOCAL.size + nbytes > size:
        raise HeaderError(f"has a damaged directory at `{_spelled(own)}`")
    if method != _STORED or packed != nbytes or flags & _ENCRYPTED:
        raise HeaderError(f"holds `{_spelled(own)}` compressed or encrypted, as torch never does")
    _, _, inner = own.decode("utf-8", "replace").partition("/")
    return (
        inner,
        Entry(own, header, nbytes, fields[7]),
        first + name_length + extra_length + comment_length,
    )


def _zip64_fields(extra: bytes) -> Iterator[int]:
    """Return the 64-bit numbers of a record, in the order of the fields that they stand for."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == _ZIP64:
            body = extra[4 : 4 + length]
            return iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
        extra = extra[4 + length :]
    return iter(())


def data_offset(local: bytes, entry: Entry, size: int) -> int:
    """Return where the data of a record begins; `local` are the bytes from its header on."""
    if len(local) < _LOCAL.size or local[:4] != b"PK\x03\x04":
        raise HeaderError(f"has the record `{_spelled(entry.name)}` without its header")
    name_length, extra_length = _LOCAL.unpack_from(local)[9:11]
    if local[_LOCAL.size : _LOCAL.size + name_length] != entry.name:
        raise HeaderError(f"has the record `{_spelled(entry.name)}` under another name")
    offset = entry.header + _LOCAL.size + name_length + extra_length
    if offset + entry.nbytes > size:
        raise HeaderError(f"has the record `{_spelled(entry.name)}`, which ends outside of it")
    return int(offset)


class Record(NamedTuple):
    """A record to write: small `data`, or the size of elements that somebody else fills in."""

    name: str
    data: bytes
    nbytes: int


class Checked(NamedTuple):
    """Elements whose CRC-32 has to be written into `places` when they are there."""

    offset: int
    nbytes: int
    places: tuple[int, ...]


class Archive(NamedTuple):
    """An archive in its place in a file: what is around the elements, and what has to be summed."""

    parts: tuple[FileBytes, ...]
    checked: tuple[Checked, ...]
    end: int

    def offsets(self) -> list[int]:
        """Return where the elements of each storage begin."""
        return [item.offset for item in self.checked]


def build_archive(start: int, pickled: bytes, storages: Mapping[str, int]) -> Archive:
    """Lay an archive out from byte `start` of a file; `storages` are sizes in bytes by key.

    Elements begin at disk blocks, so that they are written past the page cache.
    """
    writer = _Writer(start)
    writer.add(Record(PICKLE_NAME, pickled, len(pickled)))
    writer.add(Record("byteorder", b"little", 6))
    for key, nbytes in storages.items():
        writer.add(Record(f"data/{key}", b"", nbytes))
    writer.add(Record("version", b"3\n", 2))
    return writer.finish()


class _Writer:
    def __init__(self, start: int) -> None:
        self.start = start
        self.position = start
        self.parts: list[FileBytes] = []
        self.open: list[tuple[int, int, int]] = []  # offset, nbytes, place in the local header
        self.central: list[bytes] = []
        self.central_places: list[int] = []

    def add(self, record: Record) -> None:
        name = f"archive/{record.name}".encode()
        is_elements = not record.data
        crc = zlib.crc32(record.data)
        header = self.position
        wide = record.nbytes >= _MAX32
        extra = struct.pack("<2H2Q", _ZIP64, 16, record.nbytes, record.nbytes) if wide else b""
        if is_elements:
            data = header + _LOCAL.size + len(name) + len(extra) + 4
            padding = -data % BLOCK_BYTES
            extra += struct.pack("<2H", _PADDING, padding) + b"Z" * padding
        small = _MAX32 if wide else record.nbytes
        local = _LOCAL.pack(
            b"PK\x03\x04", 45 if wide else 20, _UTF8, _STORED, 0, 0x21, crc, small, small,
            len(name), len(extra),
        )  # fmt: skip
        self._put(local + name + extra + record.data)
        if is_elements:
            self.open.append((self.position, record.nbytes, header + _CRC_IN_LOCAL))
            self.central_places.append(sum(map(len, self.central)) + _CRC_IN_CENTRAL)
            self.position += record.nbytes
        self.central.append(_central(name, crc, record.nbytes, header - self.start))

    def _put(self, data: bytes) -> None:
        last = self.parts[-1] if self.parts else None
        if last and last.offset + len(last.data) == self.position:
            self.parts[-1] = FileBytes(last.offset, last.data + data)
        else:
            self.parts.append(FileBytes(self.position, data))
        self.position += len(data)

    def finish(self) -> Archive:
        directory = self.position
        raw = b"".join(self.central)
        count, offset = len(self.central), directory - self.start
        end64 = _END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(raw), offset)
        locator = _LOCATOR.pack(b"PK\x06\x07", 0, offset + len(raw), 1)
        few, short = min(count, 0xFFFF), min(len(raw), _MAX32)
        end = _END.pack(b"PK\x05\x06", 0, 0, few, few, short, min(offset, _MAX32), 0)
        self._put(raw + end64 + locator + end)
        checked = tuple(
            Checked(offset, nbytes, (place, directory + central))
            for (offset, nbytes, place), central in zip(self.open, self.central_places, strict=True)
        )
        return Archive(tuple(self.parts), checked, self.position)


def _central(name: bytes, crc: int, nbytes: int, header: int) -> bytes:
    wide = [value for value in (nbytes, nbytes, header) if value >= _MAX32]
    extra = struct.pack(f"<2H{len(wide)}Q", _ZIP64, 8 * len(wide), *wide) if wide else b""
    version = 45 if wide else 20
    size, offset = min(nbytes, _MAX32), min(header, _MAX32)
    return (
        _CENTRAL.pack(
            b"PK\x01\x02", version, version, _UTF8, _STORED, 0, 0x21, crc, size, size,
            len(name), len(extra), 0, 0, 0, 0, offset,
        )
        + name
        + extra
    )  # fmt: skip


class ArchiveReader:
    """An archive of `size` bytes: its pickle, and where the elements of its storages are."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = _peeking(read, size)
        self._size = size
        self._entries = read_directory(self._read, size)
        if PICKLE_NAME not in self._entries:
            raise HeaderError(f"holds no `{PICKLE_NAME}`")
        # Archives of older versions do not say, and are little.
        known = "byteorder" in self._entries
        order = self.record("byteorder", _MAX_ORDER) if known else b"little"
        if order != b"little":
            raise HeaderError(f"was written with byte order {order!r}")

    def record(self, name: str, most: int) -> bytes:
        """Return a small record of at most `most` bytes.

        Raises HeaderError when it is larger, or is not what its CRC-32 says.
        """
        offset, nbytes, crc = self._place(self._entries[name])
        if nbytes > most:
            raise HeaderError(f"has `{name}` of {nbytes:,} bytes; at most {most:,} are read")
        data = self._read(offset, nbytes)
        if crc and zlib.crc32(data) != crc:  # torch writes 0 when it is told to write none
            raise HeaderError(f"has `{name}` damaged: its CRC-32 is {crc:#010x} no more")
        return data

    def elements(self, key: str) -> Elements:
        """Return where the elements of storage `key` are."""
        entry = self._entries.get(f"data/{key}")
        if entry is None:
            raise HeaderError(f"holds no `data/{key}`, which `{PICKLE_NAME}` refers to")
        return self._place(entry)

    def _place(self, entry: Entry) -> Elements:
        local = self._read(entry.header, _LOCAL.size + len(entry.name))
        return Elements(data_offset(local, entry, self._size), entry.nbytes, entry.crc)


def _peeking(read: Read, size: int) -> Read:
    """Return `read` with what lies around the elements read at once: beginning and end."""
    head = read(0, min(size, PEEK_BYTES))
    start = max(0, size - PEEK_BYTES)
    tail = read(start, size - start)

    def peek(offset: int, count: int) -> bytes:
        if offset + count <= len(head):
            return head[offset : offset + count]
        if offset >= start:
            return tail[offset - start : offset - start + count]
        return read(offset, count)

    return peek


def patches(checked: Sequence[Checked], crc_of: Callable[[Checked], int]) -> list[FileBytes]:
    """Return the checksums of an archive's elements, each for the places that state it."""
    return [
        FileBytes(place, struct.pack("<I", crc))
        for item in checked
        for crc in (crc_of(item),)
        for place in item.places
    ]
