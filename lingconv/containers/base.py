"""What a format must be able to do.."""

from typing import NamedTuple


class FileBytes(NamedTuple):
    """Bytes at an offset."""

    offset: int
    data: bytes
