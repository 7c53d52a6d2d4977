"""The state of a pickle that is run without Python's own unpickler: data in, plain values out.

Nothing is imported, called or changed: a class is its name (GlobalRef), an object is what it was
given (OpaqueObject), and only what this pickle itself has built can be built upon. Each opcode
takes a time that its own bytes bound, but for the few that walk through what others have built;
those are charged for it, as is everything that takes memory. No value is hashed, compared or shown
by walking through it. A pickle that goes beyond the bounds is refused.

Source of the opcodes: CPython's Lib/pickletools.py; of the tensors: torch/serialization.py and
torch/_utils.py of PyTorch 2.13.
"""

from collections.abc import Callable
from typing import Any

from lingconv.containers.megatron.pickle_values import STORAGES, TORCH_DTYPES, GlobalRef

# `.metadata` with 500,000 chunks takes 80 MB and 7 million objects, which are 0.9 GB of memory.
MAX_BYTES = 192 << 20
MAX_OBJECTS = 10_000_000
_MAX_LINE = 4_096
_MAX_NAME = 1_024
_CHARGED_BYTES = 64  # of texts and the like count as one object more
_DTYPES = {f"torch.{name}": dtype for name, dtype in {**STORAGES, **TORCH_DTYPES}.items()}


class Machine:
    """The stack of a pickle that is run, its marks, its memo, and how many objects are `left`."""

    __slots__ = ("data", "left", "marks", "memo", "names", "stack")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.names: dict[str, GlobalRef] = {}
        self.left = MAX_OBJECTS

    def popped_mark(self) -> list[Any]:
        """Return what is above the topmost mark, taken off the stack."""
        start, stack = self.marks.pop(), self.stack
        items = stack[start:]
        del stack[start:]
        return items

    def taken(self, position: int, count: int) -> bytes:
        """Return `count` bytes of the pickle, and charge for them."""
        raw = self.data[position : position + count]
        if len(raw) != count:
            raise ValueError(f"{count:,} bytes are announced, {len(raw):,} are there")
        self.left -= 1 + count // _CHARGED_BYTES
        return raw

    def line(self, position: int, most: int = _MAX_LINE) -> tuple[bytes, int]:
        """Return the bytes up to the end of the line, and where the next line begins."""
        end = self.data.find(b"\n", position, position + most)
        if end < 0:
            raise ValueError("a line has no end")
        return self.taken(position, end - position), end + 1

    def put(self, number: int) -> None:
        """Remember what is on top of the stack under a number, which has to be the next one."""
        memo = self.memo
        if number == len(memo):
            memo.append(self.stack[-1])
        elif number < len(memo):
            memo[number] = self.stack[-1]
        elif number == len(memo) + 1:  # Python 2 began to count at one
            memo += (None, self.stack[-1])
        else:
            raise ValueError(f"memo entry {number:,} is put where there are {len(memo):,}")

    def named(self, module: str, name: str) -> Any:
        """Return what stands for a class or a function: a dtype, or its name."""
        full = f"{module}.{name}"
        if len(full) > _MAX_NAME:
            raise ValueError(f"a class has a name of {len(full):,} characters")
        if full in _DTYPES:
            return _DTYPES[full]
        if full not in self.names:
            self.left -= 1
            self.names[full] = GlobalRef(full)
        return self.names[full]


# Takes the state, and the position behind the opcode; returns that of the next one. All raise
# ValueError, TypeError, IndexError or struct.error for what is damaged or not allowed.
Opcode = Callable[[Machine, int], int]
