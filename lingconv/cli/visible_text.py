r"""Text that strangers wrote, made safe to show: names of tensors and files, words of servers.

A terminal obeys what it prints: it clears the screen, writes the clipboard, turns letters around.
So whatever is not a letter to be seen becomes the escape that Python would write: \x1b, \u202e.
"""

import re
from typing import Final

MAX_LINE: Final = 4_000
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m|\n)")
# Letters by Unicode's word, but blank: the fillers of Hangul, and of Braille.
_BLANK: Final = "\u115f\u1160\u2800\u3164\uffa0\u034f"


def visible(text: str) -> str:
    """Return one line: control, format and private characters escaped, line ends too, and cut.

    Of more than `MAX_LINE` characters the middle is left out, and how many those were is said.
    """
    if len(text) > MAX_LINE:
        keep = MAX_LINE // 2
        left_out = f" ... {len(text) - 2 * keep:,} characters left out ... "
        text = f"{text[:keep]}{left_out}{text[-keep:]}"
    return _escaped(text)


def filtered(text: str) -> str:
    """Return what a library prints: line ends and colours stay, all else is made visible."""
    parts = _COLOUR.split(text)
    return "".join(part if _COLOUR.fullmatch(part) else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(char: str) -> str:
    if char.isprintable() and char not in _BLANK:
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name that is not UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    width = 2 if code < 0x100 else 4 if code < 0x10000 else 8
    return named.get(char) or f"\\{'xuU'[(width > 2) + (width > 4)]}{code:0{width}x}"
