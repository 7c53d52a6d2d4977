"""BF16 to e4m3 by table, for CPUs that look up 64 bytes at once (AVX512-VBMI).

The code of a quotient depends on its mantissa, plus 8 times its exponent: from one octave (power of
two) to the next, the code grows by 8. A block's table of one octave, with its 128 BF16 mantissas,
therefore gives the code of every number that becomes a normal e4m3. The caller encodes the others.
"""

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy import float32, uint8, uint16, uint32

from lingconv.encodings.kernels.intrinsics import in_order
from lingconv.encodings.kernels.jit import helper
from lingconv.encodings.kernels.numeric import Array, float_bits, float_of

MANTISSAS: Final = 128
ENCODED: Final = 64  # elements at once

_intrinsic: Any = intrinsic
_EXPONENT: Final = 0x7F800000
_LEAST_NORMAL: Final = 2.0**-6  # of e4m3

_BYTE, _WORD, _INDEX = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_LANE = ir.IntType(32)
_BYTES, _WORDS = ir.VectorType(_BYTE, ENCODED), ir.VectorType(_WORD, ENCODED // 2)
_ALIGNED_TO = 1
_LOOK_UP = "llvm.x86.avx512.vpermi2var.qi.512"  # VPERMI2B: two registers are the table


def can_look_up() -> bool:
    """Return whether numba's target CPU has the instruction (AVX512-VBMI)."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return "+avx512vbmi," in f"{features},"


@helper
def fill_octave(scale: Any, code_of: Any, into: Array) -> None:
    """Fill a table [128] with the codes of the scale's octave, reduced to exponent 0.

    `code_of` rounds a float32 to e4m3; bytes wrap around.
    """
    octave = uint32(float_bits(scale) & uint32(_EXPONENT))
    eights = uint32(octave >> uint32(20))
    for mantissa in range(MANTISSAS):
        number = float_of(uint32(octave | uint32(uint32(mantissa) << uint32(16))))
        into[mantissa] = uint8(uint32(uint32(code_of(number / scale)) - eights) & uint32(0xFF))


@helper
def least_normal(scale: Any) -> Any:
    """Return the smallest BF16 magnitude that becomes a normal e4m3, as bits."""
    bits = float_bits(scale * float32(_LEAST_NORMAL))
    return uint16(uint32(bits + uint32(0xFFFF)) >> uint32(16))


def _splat(kind: Any, value: int, count: int) -> Any:
    return ir.Constant(ir.VectorType(kind, count), [value] * count)


def _repeated(builder: Any, word: Any) -> Any:
    nothing = ir.Constant(_WORDS, ir.Undefined)
    one = builder.insert_element(nothing, word, ir.Constant(_LANE, 0))
    return builder.shuffle_vector(one, nothing, in_order([0] * _WORDS.count))


@_intrinsic
def encode_64(
    typing_context: Any, numbers: Any, codes: Any, at: Any, tables: Any, block: Any, least: Any
) -> Any:
    """Encode 64 BF16 with the table of their block; return whether any was below `least`.

    `numbers` (uint16) and `codes` (uint8) are lines, `at` the index in both; `tables` is
    [blocks, 128]. The caller has to encode numbers below `least` again.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers, codes, tables = (
            context.make_array(signature.args[n])(context, builder, args[n]) for n in (0, 1, 3)
        )
        at, block, least = args[2], args[4], _repeated(builder, args[5])

        def pointer(array: Any, index: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(array.data, [index]), kind.as_pointer())

        def halves(array: Any, index: Any, kind: Any, count: int) -> list[Any]:
            second = builder.add(index, _INDEX(count))
            places = (pointer(array, index, kind), pointer(array, second, kind))
            return [builder.load(place, align=_ALIGNED_TO) for place in places]

        def bytes_of(words: list[Any], first: int) -> Any:
            """Return every second byte of `words`."""
            low, high = (builder.bitcast(word, _BYTES) for word in words)
            return builder.shuffle_vector(low, high, in_order(range(first, 2 * ENCODED, 2)))

        words = halves(numbers, at, _WORDS, ENCODED // 2)
        table = halves(tables, builder.mul(block, _INDEX(MANTISSAS)), _BYTES, ENCODED)
        kind = ir.FunctionType(_BYTES, [_BYTES] * 3)
        look_up = builder.module.declare_intrinsic(_LOOK_UP, [], kind)
        found = builder.call(look_up, [table[0], bytes_of(words, 0), table[1]])
        four = _splat(_WORD, 4, _WORDS.count)
        exponents = bytes_of([builder.lshr(word, four) for word in words], 0)
        eights = builder.and_(exponents, _splat(_BYTE, 0xF8, ENCODED))
        magnitudes = builder.and_(builder.add(found, eights), _splat(_BYTE, 0x7F, ENCODED))
        signs = builder.and_(bytes_of(words, 1), _splat(_BYTE, 0x80, ENCODED))
        builder.store(builder.or_(magnitudes, signs), pointer(codes, at, _BYTES), align=_ALIGNED_TO)

        unsigned = _splat(_WORD, 0x7FFF, _WORDS.count)
        low, high = (
            builder.icmp_unsigned("<", builder.and_(word, unsigned), least) for word in words
        )
        small = builder.bitcast(builder.or_(low, high), _LANE)
        return builder.icmp_unsigned("!=", small, ir.Constant(_LANE, 0))

    line = types.int64
    return types.boolean(numbers, codes, line, tables, line, types.uint16), codegen
