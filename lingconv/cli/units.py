"""Sizes as people write and read them: decimal for files, binary for memory."""

import re

from lingconv.errors import UsageError

_FACTORS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
    **{letter: 1000**power for power, letter in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Return the bytes that `text` names.

    >>> parse_size("5GB"), parse_size("1.5 GiB"), parse_size("4096")
    (5000000000, 1610612736, 4096)
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise UsageError(f"`{text}` is not a size", hint="write 5GB, 512MB, 1.5GiB ...")
    return int(float(match[1]) * factor)


def parse_rate(text: str) -> float:
    """Return the bytes per second that `text` names, in bits or in bytes.

    >>> parse_rate("10Gbit"), parse_rate("400MB")
    (1250000000.0, 400000000.0)
    """
    number = text.strip().removesuffix("/s").removesuffix("ps")
    if number.lower().endswith("bit"):
        return parse_size(number[:-3]) / 8
    return float(parse_size(number))


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> duration(4.2), duration(250), duration(9000)
    ('4.2 s', '4 min 10 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def file_size(nbytes: float) -> str:
    """Return a size of files, decimal.

    >>> file_size(1_999_410_696_192), file_size(512)
    ('2.00 TB', '512 B')
    """
    return _scaled(nbytes, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def memory_size(nbytes: float) -> str:
    """Return a size of memory, binary.

    >>> memory_size(1 << 30)
    '1.00 GiB'
    """
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count(number: float) -> str:
    """Return a number of parameters.

    >>> count(999_705_328_640)
    '999.71 B'
    """
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.2f} {letter}"
    return f"{number:,.0f}"


def _scaled(nbytes: float, base: int, units: tuple[str, ...]) -> str:
    size = float(nbytes)
    for unit in units[:-1]:
        if size < base:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= base
    return f"{size:.2f} {units[-1]}"
