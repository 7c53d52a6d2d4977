"""Chunks of 128 columns with one scale, for FP8's kernels.

A chunk is a loop of a fixed length with its scale in a register, which compilers turn into a few
SIMD instructions and nothing else. For rows that do not consist of whole chunks, scales are spread
to one per column first.
"""

from typing import Final

from lingconv.encodings.kernels.jit import helper
from lingconv.encodings.kernels.numeric import Array

CHUNK: Final = 128  # columns
PAIRS: Final = CHUNK // 2
LINE: Final = 64  # bytes of a cache line


@helper
def has_chunks(cols: int, block_cols: int) -> bool:
    """Return whether a row consists of whole chunks with one scale each."""
    return cols % CHUNK == 0 and (block_cols % CHUNK == 0 or block_cols >= cols)


@helper
def chunks_of_block(chunks: int, block_cols: int) -> int:
    """Return the number of chunks of a block, in a row of `chunks`."""
    return min(chunks, max(1, block_cols // CHUNK))


@helper
def spread(scales: Array, block_cols: int, into: Array) -> None:
    """Fill `into` [cols] with the scale of each column's block."""
    for block_col in range(scales.size):
        scale = scales[block_col]
        left = block_col * block_cols
        part = into[left : min(left + block_cols, into.size)]
        for i in range(part.size):  # counted from 0: an index that may be negative stops SIMD
            part[i] = scale
