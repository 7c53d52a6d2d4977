"""Opcodes of a pickle that put others' values together: containers, objects, and calls.

Nothing is called but the few functions in `_CALLS`, which are lingconv's own; and nothing is built
upon but what the same pickle has made.

Three runs of opcodes are half of every `.metadata`, and are taken at once: see `_SIZE_OF`,
`_BEGIN_STATE`, and `_setitems`.
"""

import pickle
from collections.abc import Callable
from typing import Any

from lingconv.containers.megatron.pickle_machine import Machine, Opcode
from lingconv.containers.megatron.pickle_values import (
    GlobalRef,
    OpaqueKey,
    OpaqueObject,
    StorageRef,
    TensorRef,
    is_count,
    is_shape,
    is_sizes,
    shown,
)
from lingconv.encodings.dtypes import DType

MAX_DEPTH = 1_000  # marks that are open at once; Python's own pickler gives up near there, too
_PLAIN_KEYS = frozenset({str, bytes, bool, float, type(None), DType, GlobalRef, OpaqueObject})

# Behind a tuple: it becomes the argument of a call. Each of the three values is memorized.
_SIZE_OF = b"".join((pickle.MEMOIZE, pickle.TUPLE1, pickle.MEMOIZE, pickle.REDUCE, pickle.MEMOIZE))
# Behind an empty tuple: an object is made, and the dictionary of its state is begun.
_BEGIN_STATE = b"".join(
    (pickle.NEWOBJ, pickle.MEMOIZE, pickle.EMPTY_DICT, pickle.MEMOIZE, pickle.MARK)
)
_BUILD = pickle.BUILD[0]


# Containers --------------------------------------------------------------------------------------


def _mark(machine: Machine, position: int) -> int:
    if len(machine.marks) >= MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH:,} marks are open")
    machine.marks.append(len(machine.stack))
    return position


def _empty(make: Callable[[], Any]) -> Opcode:
    def push(machine: Machine, position: int) -> int:
        machine.left -= 1
        machine.stack.append(make())
        return position

    return push


def _empty_tuple(machine: Machine, position: int) -> int:
    stack = machine.stack
    if not machine.data.startswith(_BEGIN_STATE, position):
        stack.append(())
        return position
    made = _new(machine, stack[-1], ())
    state: dict[Any, Any] = {}
    machine.left -= 1
    machine.memo += (made, state)
    stack[-1] = made
    stack.append(state)
    return _mark(machine, position + 5)


def _tuple(machine: Machine, position: int) -> int:
    items = tuple(machine.popped_mark())
    return _push_tuple(machine, position, items)


def _push_tuple(machine: Machine, position: int, items: tuple[Any, ...]) -> int:
    machine.left -= 1
    stack = machine.stack
    if not machine.data.startswith(_SIZE_OF, position):
        stack.append(items)
        return position
    machine.left -= 1
    args = (items,)
    made = _called(machine, stack[-1], args)
    machine.memo += (items, args, made)
    stack[-1] = made
    return position + 5


def _tuple_of(count: int) -> Opcode:
    def push(machine: Machine, position: int) -> int:
        stack = machine.stack
        items = tuple(stack[-count:])
        if len(items) != count:
            raise IndexError("the stack is empty")
        del stack[-count:]
        return _push_tuple(machine, position, items)

    return push


def _new_list(machine: Machine, position: int) -> int:
    machine.left -= 1
    machine.stack.append(machine.popped_mark())
    return position


def _new_dict(machine: Machine, position: int) -> int:
    items = machine.popped_mark()
    machine.stack.append({})
    _set_all(machine, items)
    return position


def _new_frozenset(machine: Machine, position: int) -> int:
    machine.left -= 1
    found = OpaqueObject("builtins.frozenset")
    found.items = machine.popped_mark()
    machine.stack.append(found)
    return position


def _append(machine: Machine, position: int) -> int:
    _add_all(machine, [machine.stack.pop()])
    return position


def _appends(machine: Machine, position: int) -> int:
    _add_all(machine, machine.popped_mark())
    return position


def _add_all(machine: Machine, items: list[Any]) -> None:
    into = machine.stack[-1]
    if type(into) is OpaqueObject:
        into = _items_of(into)
    if type(into) is not list:
        raise TypeError(f"{shown(into)} takes no items")
    into += items


def _items_of(made: OpaqueObject) -> list[Any]:
    """Return the list of what an object was given; most are given nothing and have none."""
    if type(made.items) is not list:
        made.items = []
    return made.items


def _setitem(machine: Machine, position: int) -> int:
    value = machine.stack.pop()
    key = machine.stack.pop()
    _set_all(machine, [key, value])
    return position


def _setitems(machine: Machine, position: int) -> int:
    _set_all(machine, machine.popped_mark())
    if machine.data[position] == _BUILD:
        return _build(machine, position + 1)
    return position


def _set_all(machine: Machine, items: list[Any]) -> None:
    into = machine.stack[-1]
    machine.left -= 1 + len(items) // 2
    walk = iter(items)
    pairs = zip(walk, walk, strict=True)
    if type(into) is dict:
        for key, value in pairs:
            into[key if type(key) in _PLAIN_KEYS else _key(key)] = value
    elif type(into) is OpaqueObject:
        _items_of(into).extend(pairs)
    else:
        raise TypeError(f"{shown(into)} takes no pairs")


def _key(value: Any) -> Any:
    """Return a value as a key whose hash nobody can choose so that many keys have the same."""
    kind = type(value)
    if kind is int and -(2**60) < value < 2**60:
        return value
    if kind in (list, dict):
        raise TypeError(f"{shown(value)} is a key")
    return OpaqueKey(value)


# Objects -----------------------------------------------------------------------------------------


def _global(machine: Machine, position: int) -> int:
    module, position = machine.line(position)
    name, position = machine.line(position)
    machine.stack.append(machine.named(module.decode(), name.decode()))
    return position


def _stack_global(machine: Machine, position: int) -> int:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError("a class is named by no text")
    machine.stack.append(machine.named(module, name))
    return position


def _new(machine: Machine, kind: Any, args: Any) -> OpaqueObject:
    machine.left -= 1
    if type(kind) is not GlobalRef or type(args) is not tuple:
        raise TypeError(f"{shown(kind)} makes no objects")
    return OpaqueObject(kind.name, args)


def _newobj(machine: Machine, position: int) -> int:
    stack = machine.stack
    args = stack.pop()
    stack[-1] = _new(machine, stack[-1], args)
    return position


def _newobj_ex(machine: Machine, position: int) -> int:
    machine.stack.pop()  # nobody asks for what was given by name
    return _newobj(machine, position)


def _obj(machine: Machine, position: int) -> int:
    kind, *args = machine.popped_mark()
    machine.stack.append(_new(machine, kind, tuple(args)))
    return position


def _inst(machine: Machine, position: int) -> int:
    position = _global(machine, position)
    kind = machine.stack.pop()
    machine.stack.append(_new(machine, kind, tuple(machine.popped_mark())))
    return position


def _build(machine: Machine, position: int) -> int:
    """Give an object its state. Nothing has one but what this pickle has made itself."""
    state = machine.stack.pop()
    made = machine.stack[-1]
    if type(made) is OpaqueObject:
        made.state = state
    elif type(made) is not dict:  # attributes of an OrderedDict are none of its items
        raise TypeError(f"attributes of {shown(made)} are set")
    return position


def _reduce(machine: Machine, position: int) -> int:
    args = machine.stack.pop()
    if type(args) is not tuple:
        raise TypeError("arguments are no tuple")
    machine.stack[-1] = _called(machine, machine.stack[-1], args)
    return position


def _called(machine: Machine, function: Any, args: tuple[Any, ...]) -> Any:
    if type(function) is GlobalRef:
        call = _CALLS.get(function.name)
        return call(machine, args) if call else _new(machine, function, args)
    if type(function) is not OpaqueObject:
        raise TypeError(f"{shown(function)} is called")
    machine.left -= 1
    return OpaqueObject("", args)  # what calling the unknown gives is unknown as well


def _persistent(machine: Machine, position: int) -> int:
    """Take a storage; torch writes no other persistent ids."""
    pid = machine.stack[-1]
    if type(pid) is not tuple or len(pid) != 5:
        raise ValueError(f"{shown(pid)} is no storage")
    word, dtype, key, _, numel = pid
    if type(word) is not str or word != "storage" or type(key) is not str or not is_count(numel):
        raise ValueError(f"{shown(word)} of {shown(numel)} elements is no storage")
    machine.left -= 1
    machine.stack[-1] = StorageRef(key, dtype if isinstance(dtype, DType) else None, numel)
    return position


# What a few names mean ---------------------------------------------------------------------------


def _mapping(machine: Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = args[0] if args else []
    if type(pairs) not in (list, tuple) or len(args) > 1:
        raise TypeError("an OrderedDict is made of no list")
    machine.left -= len(pairs)
    if machine.left < 0 or not all(
        type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError("an OrderedDict is made of no pairs")
    return {key if type(key) in _PLAIN_KEYS else _key(key): value for key, value in pairs}


def _size(machine: Machine, args: tuple[Any, ...]) -> tuple[Any, ...]:
    (sizes,) = args
    if type(sizes) is not tuple:
        raise TypeError(f"{shown(sizes)} is no torch.Size")
    return sizes  # whoever needs sizes looks whether they are some


def _tensor(machine: Machine, args: tuple[Any, ...]) -> TensorRef:
    storage, first, shape, stride, *_ = args
    machine.left -= 1
    if type(storage) is not StorageRef or not is_count(first):
        raise ValueError(f"a tensor begins at {shown(first)} of {shown(storage)}")
    if not is_shape(shape) or not is_sizes(stride) or len(shape) != len(stride):
        raise ValueError(f"a tensor has shape {shown(shape)} and strides {shown(stride)}")
    return TensorRef(storage, first, shape, stride)


def _parameter(machine: Machine, args: tuple[Any, ...]) -> Any:
    return args[0]


_CALLS: dict[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _mapping,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


OBJECT_OPCODES: dict[str, Opcode] = {
    "MARK": _mark, "EMPTY_LIST": _empty(list), "EMPTY_DICT": _empty(dict),
    "EMPTY_SET": _empty(lambda: OpaqueObject("builtins.set")), "FROZENSET": _new_frozenset,
    "LIST": _new_list, "DICT": _new_dict, "TUPLE": _tuple,
    "EMPTY_TUPLE": _empty_tuple,
    "TUPLE1": _tuple_of(1), "TUPLE2": _tuple_of(2), "TUPLE3": _tuple_of(3),
    "APPEND": _append, "APPENDS": _appends, "ADDITEMS": _appends,
    "SETITEM": _setitem, "SETITEMS": _setitems,
    "GLOBAL": _global, "STACK_GLOBAL": _stack_global, "REDUCE": _reduce, "BUILD": _build,
    "NEWOBJ": _newobj, "NEWOBJ_EX": _newobj_ex, "OBJ": _obj, "INST": _inst,
    "BINPERSID": _persistent,
}  # fmt: skip
