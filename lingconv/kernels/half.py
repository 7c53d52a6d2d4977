"""F16 as a way from e4m3 to float32, for processors that convert F16.

An e4m3 code, moved into the places of sign, exponent and mantissa of F16, is a number 2^8 times too
small, subnormal ones included: the exponents' biases are 7 and 15. Processors without the
instruction take the arithmetic way. Both are exact.
"""

import platform
from typing import Any, Final

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic, overload
from numpy import int8, int16, uint16, uint32

from lingconv.kernels.numeric import float_bits, float_of, load_e4m3, sign_of_e4m3

_CONVERTS_F16: Final = platform.machine() != "x86_64" or bool(get_host_cpu_features().get("f16c"))
_intrinsic: Any = intrinsic
# What the result of `finite_e4m3` has to be multiplied by.
E4M3_GAIN: Final = 2.0**8 if _CONVERTS_F16 else 1.0


@_intrinsic
def _float_of_half(typing_context: Any, bits: Any) -> Any:
    """Return the float32 of F16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


def finite_e4m3(code: Any) -> Any:
    """Return the float32 of an e4m3 code that is not NaN, divided by E4M3_GAIN."""


@overload(finite_e4m3)
def _finite_e4m3_overload(code: Any) -> Any:
    def converted(code: Any) -> Any:
        return _float_of_half(uint16(uint16(int16(int8(code)) << int16(7)) & uint16(0xBF80)))

    def computed(code: Any) -> Any:
        return float_of(uint32(float_bits(load_e4m3(code)) ^ sign_of_e4m3(code)))

    return converted if _CONVERTS_F16 else computed
