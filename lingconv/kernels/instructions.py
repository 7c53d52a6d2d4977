"""Instructions of processors that numba has no word for.

Where a processor has no fused multiply-add, a library computes it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_intrinsic: Any = intrinsic
_unpack: Any = cgutils.unpack_tuple

_FOR_READING, _INTO_ALL_CACHES, _DATA = 0, 3, 1  # as llvm.prefetch counts


@_intrinsic
def fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return float32 a * b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@_intrinsic
def prefetch(typing_context: Any, array: Any, i: Any, j: Any, k: Any) -> Any:
    """Ask for the memory around an element of a contiguous array of three axes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        _, middle, inner = _unpack(builder, array.shape)
        row = builder.add(builder.mul(args[1], middle), args[2])
        index = builder.add(builder.mul(row, inner), args[3])
        byte = ir.IntType(8).as_pointer()
        place = builder.bitcast(builder.gep(array.data, [index]), byte)
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        flags = [ir.Constant(flag, x) for x in (_FOR_READING, _INTO_ALL_CACHES, _DATA)]
        builder.call(ask, [place, *flags])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, types.int64), codegen
