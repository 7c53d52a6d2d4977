"""Runs the opcodes of a pickle: the values that their own bytes say, the memo, and the table.

Source: CPython's Lib/pickletools.py.
"""

import pickle
import re
import struct
from collections.abc import Callable
from typing import Any

from lingconv.containers.megatron.pickle_machine import MAX_BYTES, MAX_OBJECTS, Machine, Opcode
from lingconv.containers.megatron.pickle_objects import OBJECT_OPCODES

_MAX_NUMBER_BYTES = 255
_MAX_LINE = 4_096
_U8, _U32, _U64 = struct.Struct("<B"), struct.Struct("<I"), struct.Struct("<Q")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def run(data: bytes) -> Any:
    """Return the value of the pickle.

    Raises ValueError, TypeError, IndexError or struct.error for one that is damaged, goes
    beyond the bounds, or wants what only running somebody's code could give.
    """
    machine = Machine(data)
    stack, memo = machine.stack, machine.memo
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes are too many")
    position, unpack, opcodes = 0, _U32.unpack_from, _OPCODES
    while True:  # what most of every `.metadata` consists of is spelled out here
        code = data[position]
        position += 1
        opcode = opcodes[code]
        if opcode is not None:
            position = opcode(machine, position)
            if machine.left < 0:
                raise ValueError(f"more than {MAX_OBJECTS:,} objects are too many")
        elif code == _LONG_BINGET:
            stack.append(memo[unpack(data, position)[0]])
            position += 4
        elif code == _BINGET:
            stack.append(memo[data[position]])
            position += 1
        elif code == _BININT1:
            stack.append(data[position])
            position += 1
        elif code == _BININT2:
            stack.append(data[position] | data[position + 1] << 8)
            position += 2
        elif code == _MEMOIZE:
            memo.append(stack[-1])
        elif code == _LONG_BINPUT:
            machine.put(unpack(data, position)[0])
            position += 4
        else:
            return stack[-1]


# Values that their own bytes say -----------------------------------------------------------------


def _constant(value: Any) -> Opcode:
    def push(machine: Machine, position: int) -> int:
        machine.stack.append(value)
        return position

    return push


def _fixed(layout: struct.Struct) -> Opcode:
    def push(machine: Machine, position: int) -> int:
        machine.stack.append(layout.unpack_from(machine.data, position)[0])
        machine.left -= 1
        return position + layout.size

    return push


def _sized(layout: struct.Struct, read: Callable[[bytes], Any]) -> Opcode:
    """Return an opcode that states how many bytes it has."""

    def push(machine: Machine, position: int) -> int:
        (count,) = layout.unpack_from(machine.data, position)
        position += layout.size
        machine.stack.append(read(machine.taken(position, count)))
        return position + int(count)

    return push


def _long1(machine: Machine, position: int) -> int:
    first = position + 1
    end = first + machine.data[position]
    if end > len(machine.data):
        raise ValueError(f"a number has bytes up to {end:,}, which are not there")
    machine.left -= 1
    machine.stack.append(int.from_bytes(machine.data[first:end], "little", signed=True))
    return end


def _lined(read: Callable[[bytes], Any], most: int = _MAX_LINE) -> Opcode:
    """Return an opcode of protocol 0, whose bytes end with the line."""

    def push(machine: Machine, position: int) -> int:
        raw, position = machine.line(position, most)
        machine.stack.append(read(raw))
        return position

    return push


def _number(raw: bytes) -> int:
    if len(raw) > _MAX_NUMBER_BYTES:
        raise ValueError(f"a number has {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _decimal(raw: bytes) -> int | bool:
    if raw in (b"00", b"01"):
        return raw == b"01"
    if len(raw) > _MAX_NUMBER_BYTES:
        raise ValueError(f"a number has {len(raw):,} digits")
    return int(raw.removesuffix(b"L"))


def _utf8(raw: bytes) -> str:
    return raw.decode()


def _latin1(raw: bytes) -> str:
    return raw.decode("latin1")


def _quoted(raw: bytes) -> str:
    """Return a text of protocol 0 in Python 2: between quotes, with escapes."""
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
        raise ValueError("a text has no quotes")
    return _ESCAPE.sub(_unescaped, raw[1:-1]).decode("latin1")


def _unescaped(match: re.Match[bytes]) -> bytes:
    word = match[1]
    return bytes([int(word[1:], 16)]) if word[:1] == b"x" and word[1:] else _ESCAPED.get(word, word)


def _raw_escaped(raw: bytes) -> str:
    text = raw.decode("raw_unicode_escape")
    text.encode()  # a lone surrogate is no text
    return text


# Stack and memo -----------------------------------------------------------------------------------


def _pop(machine: Machine, position: int) -> int:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()
    return position


def _pop_mark(machine: Machine, position: int) -> int:
    machine.popped_mark()
    return position


def _dup(machine: Machine, position: int) -> int:
    machine.stack.append(machine.stack[-1])
    return position


def _put(layout: struct.Struct) -> Opcode:
    def put(machine: Machine, position: int) -> int:
        machine.put(layout.unpack_from(machine.data, position)[0])
        return position + layout.size

    return put


def _put_line(machine: Machine, position: int) -> int:
    raw, position = machine.line(position)
    machine.put(_memo_number(raw))
    return position


def _get_line(machine: Machine, position: int) -> int:
    raw, position = machine.line(position)
    machine.stack.append(machine.memo[_memo_number(raw)])
    return position


def _memo_number(raw: bytes) -> int:
    if not raw.isdigit() or len(raw) > 10:
        raise ValueError("a memo entry has no number")
    return int(raw)


def _protocol(machine: Machine, position: int) -> int:
    if machine.data[position] > pickle.HIGHEST_PROTOCOL:
        raise ValueError(f"protocol {machine.data[position]} is unknown")
    return position + 1


def _frame(machine: Machine, position: int) -> int:
    (count,) = _U64.unpack_from(machine.data, position)
    if position + 8 + count > len(machine.data):
        raise ValueError(f"a frame of {count:,} bytes is not there")
    return position + 8


def _refused(name: str) -> Opcode:
    def refuse(machine: Machine, position: int) -> int:
        raise ValueError(f"opcode {name} needs what is not in the file")

    return refuse


def _unknown(machine: Machine, position: int) -> int:
    raise ValueError(f"byte {machine.data[position - 1]:#04x} is no opcode")


_NAMED: dict[str, Opcode] = {
    "PROTO": _protocol, "FRAME": _frame, "NONE": _constant(None),
    "NEWTRUE": _constant(True), "NEWFALSE": _constant(False),
    "BININT": _fixed(_I32), "BINFLOAT": _fixed(_F64),
    "LONG1": _long1, "LONG4": _sized(_U32, _number),
    "SHORT_BINUNICODE": _sized(_U8, _utf8), "BINUNICODE": _sized(_U32, _utf8),
    "BINUNICODE8": _sized(_U64, _utf8),
    "SHORT_BINSTRING": _sized(_U8, _latin1), "BINSTRING": _sized(_U32, _latin1),
    "SHORT_BINBYTES": _sized(_U8, bytes), "BINBYTES": _sized(_U32, bytes),
    "BINBYTES8": _sized(_U64, bytes), "BYTEARRAY8": _sized(_U64, bytes),
    "INT": _lined(_decimal), "LONG": _lined(_decimal), "FLOAT": _lined(float),
    "STRING": _lined(_quoted, MAX_BYTES), "UNICODE": _lined(_raw_escaped, MAX_BYTES),
    "POP": _pop, "POP_MARK": _pop_mark, "DUP": _dup,
    "PUT": _put_line, "BINPUT": _put(_U8), "GET": _get_line,
    **OBJECT_OPCODES,
    **{
        name: _refused(name)
        for name in ("PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
    },
}  # fmt: skip
_OPCODES: list[Opcode | None] = [_unknown] * 256
for _name, _opcode in _NAMED.items():
    _OPCODES[getattr(pickle, _name)[0]] = _opcode
_MEMOIZE, _STOP = pickle.MEMOIZE[0], pickle.STOP[0]
_BINGET, _LONG_BINGET = pickle.BINGET[0], pickle.LONG_BINGET[0]
_LONG_BINPUT = pickle.LONG_BINPUT[0]
_BININT1, _BININT2 = pickle.BININT1[0], pickle.BININT2[0]
for _code in (_STOP, _MEMOIZE, _BINGET, _LONG_BINGET, _LONG_BINPUT, _BININT1, _BININT2):
    _OPCODES[_code] = None
