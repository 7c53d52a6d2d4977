"""Intrinsics for CPU instructions that numba does not expose.

On CPUs without fused multiply-add, a library function computes it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_intrinsic: Any = intrinsic
_unpack: Any = cgutils.unpack_tuple

_BYTE = ir.IntType(8).as_pointer()
_LANE = ir.IntType(32)
_INDEX = ir.IntType(64)
_SIXTEEN = ir.VectorType(ir.FloatType(), 16)
_NOTHING = ir.Constant(_SIXTEEN, ir.Undefined)
_FOR_READING, _INTO_ALL_CACHES, _DATA = 0, 3, 1  # arguments of llvm.prefetch


@_intrinsic
def fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return float32 a * b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@_intrinsic
def prefetch(typing_context: Any, array: Any, i: Any, j: Any, k: Any) -> Any:
    """Prefetch the cache line of an element of a contiguous array of three axes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        _, middle, inner = _unpack(builder, array.shape)
        row = builder.add(builder.mul(args[1], middle), args[2])
        index = builder.add(builder.mul(row, inner), args[3])
        place = builder.bitcast(builder.gep(array.data, [index]), _BYTE)
        kind = ir.FunctionType(ir.VoidType(), [_BYTE, _LANE, _LANE, _LANE])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE], kind)
        flags = [ir.Constant(_LANE, x) for x in (_FOR_READING, _INTO_ALL_CACHES, _DATA)]
        builder.call(ask, [place, *flags])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, types.int64), codegen


def in_order(lanes: Any) -> Any:
    """Return the constant mask of a shuffle, with the source lane of each of its lanes."""
    numbers = list(lanes)
    return ir.Constant(ir.VectorType(_LANE, len(numbers)), numbers)


@_intrinsic
def repeat_16(typing_context: Any, line: Any, first: Any, value: Any) -> Any:
    """Store a float32 sixteen times. LLVM compiles such a loop to scattered stores."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        one = builder.insert_element(_NOTHING, args[2], ir.Constant(_LANE, 0))
        sixteen = builder.shuffle_vector(one, _NOTHING, in_order([0] * 16))
        place = builder.bitcast(builder.gep(array.data, [args[1]]), _SIXTEEN.as_pointer())
        builder.store(sixteen, place, align=4)
        return context.get_dummy_value()

    return types.void(line, types.int64, types.float32), codegen


@_intrinsic
def transpose_16(
    typing_context: Any,
    matrix: Any,
    numbers: Any,
    at: Any,
    col: Any,
    line: Any,
    to: Any,
    stride: Any,
) -> Any:
    """Store 16 x 16 float32 of a contiguous matrix, transposed, in rows `stride` apart.

    They start at column `col` of the rows in `numbers`, from its item `at` on. Sixteen rows are
    interleaved four times, each row of the upper half with its partner in the lower half.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, numbers, target = (
            context.make_array(signature.args[n])(context, builder, args[n]) for n in (0, 1, 4)
        )
        _, cols = _unpack(builder, source.shape)

        def place(data: Any, row: Any, stride: Any, first: Any) -> Any:
            index = builder.add(builder.mul(row, stride), first)
            return builder.bitcast(builder.gep(data, [index]), _SIXTEEN.as_pointer())

        def number(n: int) -> Any:
            return builder.load(builder.gep(numbers.data, [builder.add(args[2], _INDEX(n))]))

        rows = [
            builder.load(place(source.data, number(n), cols, args[3]), align=4) for n in range(16)
        ]
        lower = in_order(lane for k in range(8) for lane in (k, 16 + k))
        upper = in_order(lane for k in range(8, 16) for lane in (k, 16 + k))
        for _ in range(4):
            rows = [
                builder.shuffle_vector(rows[n], rows[8 + n], order)
                for n in range(8)
                for order in (lower, upper)
            ]
        for n, row in enumerate(rows):
            builder.store(row, place(target.data, _INDEX(n), args[6], args[5]), align=4)
        return context.get_dummy_value()

    two = types.int64, types.int64
    return types.void(matrix, numbers, *two, line, *two), codegen
