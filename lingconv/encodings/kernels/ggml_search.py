"""Scale searches of ggml's K-quants and IQ4, one sub-block per SIMD lane, compiled by numba.

ggml finds the scale (and the minimum) of 16 or 32 weights by trying about twenty candidates; the
loops over such a sub-block are chains of float32 sums, whose order decides the bits. Sub-blocks are
independent, so each SIMD lane has one, and every lane keeps ggml's order.
Algorithms: ggml/src/ggml-quants.c in github.com/ggml-org/llama.cpp at 0c1e5709 (make_qkx2_quants,
make_qx_quants, make_q3_quants, quantize_row_iq4_nl_impl). No fast-math: it would change bits.

All state is one flat float32 array, in rows of LANES numbers: at X the weights of the sub-blocks
(row i has element i of every lane), at W their importance in the error, at LEVELS the levels of the
candidate, then one row for each quantity below. One array with constant offsets lets LLVM prove
that rows do not overlap. Values that a lane may keep are loaded before the choice: LLVM does not
vectorize loops with conditional loads.
"""

from typing import Any, Final

import numpy as np
from numpy import float32, int32

from lingconv.encodings.kernels.intrinsics import transpose_16
from lingconv.encodings.kernels.jit import helper
from lingconv.encodings.kernels.numeric import Array

LANES: Final = 64
MAX_SIZE: Final = 32  # elements of the largest sub-block

X: Final = 0
W: Final = X + MAX_SIZE * LANES
LEVELS: Final = W + MAX_SIZE * LANES
_ROWS: Final = LEVELS + MAX_SIZE * LANES
SCALE: Final = _ROWS  # result: the factor of a level
MIN: Final = _ROWS + 1 * LANES  # result of search_scale_min: the offset
WON_ISCALE: Final = _ROWS + 2 * LANES  # the inverse scale and ...
WON_MIN: Final = _ROWS + 3 * LANES  # ... the minimum that the winning levels were found with
PEAK: Final = _ROWS + 4 * LANES  # largest |x|, or largest x for search_scale_min
EXTREME: Final = _ROWS + 5 * LANES  # the x that has the largest |x|
_BEST: Final = _ROWS + 6 * LANES
_ISCALE: Final = _ROWS + 7 * LANES
_SUM_W: Final = _ROWS + 8 * LANES
_SUM_X: Final = _ROWS + 9 * LANES
_SUM_L: Final = _ROWS + 10 * LANES
_SUM_L2: Final = _ROWS + 11 * LANES
_SUM_XL: Final = _ROWS + 12 * LANES
_TRY_SCALE: Final = _ROWS + 13 * LANES
_TRY_MIN: Final = _ROWS + 14 * LANES
_ERROR: Final = _ROWS + 15 * LANES
_FLAT: Final = _ROWS + 16 * LANES
STATE_SIZE: Final = _ROWS + 17 * LANES

# Elements of a lane that are processed together, so that sums stay in registers.
_UNROLLED: Final = 4
_STAGES: Final = (1, 2, 5)  # rounds after which converged sub-blocks are dropped
TINY: Final = float32(1e-15)  # GROUP_MAX_EPS: sub-blocks below it are zero
_ROUNDER: Final = float32(12582912.0)  # 1.5 x 2^23: adding it leaves a rounded integer in the bits

# The sixteen values of IQ4 (kvalues_iq4nl), and the midpoints between them.
IQ4_VALUES: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
IQ4_MIDDLES: Final = (IQ4_VALUES[:-1] + IQ4_VALUES[1:]) / np.float32(2)
IQ4_STEPS: Final = IQ4_VALUES[1:] - IQ4_VALUES[:-1]


@helper
def nearest_int(value: Any) -> Any:
    """Return the nearest integer, ties to even, from the bits: NaN and Inf have results too."""
    bits = float32(value + _ROUNDER).view(np.int32)
    return int32(int32(bits & int32(0x7FFFFF)) - int32(0x400000))


@helper
def clamped(value: Any, low: int, high: int) -> Any:
    """Return the nearest integer within low ... high."""
    return max(int32(low), min(int32(high), nearest_int(value)))


@helper
def rounded(value: Any, low: Any, high: Any) -> Any:
    """Return the nearest integer within low ... high as float32; `value` must be below 2^22."""
    inside = min(max(value, low), high)
    return float32(float32(inside + _ROUNDER) - _ROUNDER)


@helper
def load_lanes(values: Array, first: int, size: int, state: Array) -> None:
    """Load sub-blocks `first`, first + 1, ... of `values` [sub-blocks, size] into the lanes.

    `size` is a multiple of 16. Lanes without a sub-block are zeros.
    """
    numbers = np.arange(first, min(first + LANES, values.shape[0]))
    gather_lanes(values, numbers, 0, size, state)


@helper
def gather_lanes(values: Array, numbers: Array, first: int, size: int, state: Array) -> None:
    """Load the sub-blocks whose numbers are in `numbers`, from its item `first` on, into lanes."""
    count = min(LANES, numbers.size - first)
    whole = count // 16 * 16
    for k in range(0, whole, 16):
        for i in range(0, size, 16):
            transpose_16(values, numbers, first + k, i, state, X + i * LANES + k, LANES)
    for k in range(whole, LANES):
        for i in range(size):
            state[X + i * LANES + k] = values[numbers[first + k], i] if k < count else float32(0)


@helper
def search_scale_min(
    state: Array, size: int, levels: int, start: Any, step: Any, steps: int, absolute: bool
) -> None:
    """Find scale and minimum such that scale x level + minimum is near x, level in 0 ... levels.

    Weights are at W. Candidates are the inverse scales (start + step x n + levels) / (max - min)
    for n = 0 ... steps, with the best min so far; the error is absolute or squared.
    """
    _begin_scale_min(state, size)
    top = float32(levels)
    for k in range(LANES):
        iscale = top / (state[PEAK + k] - state[MIN + k])
        state[_ISCALE + k] = iscale
        state[WON_ISCALE + k] = iscale
        state[WON_MIN + k] = state[MIN + k]
        state[SCALE + k] = float32(1) / iscale
        state[_TRY_SCALE + k] = state[SCALE + k]
        state[_TRY_MIN + k] = state[MIN + k]
    _try_levels(state, size, levels)
    _measure(state, size, absolute)
    for k in range(LANES):
        state[_BEST + k] = state[_ERROR + k]
    for n in range(steps + 1):
        numerator = float32(float32(start + float32(step * float32(n))) + top)
        for k in range(LANES):
            state[_ISCALE + k] = numerator / (state[PEAK + k] - state[MIN + k])
        _try_levels(state, size, levels)
        _solve(state)
        _measure(state, size, absolute)
        _keep_better(state)
    for k in range(LANES):
        scale, iscale = state[SCALE + k], state[WON_ISCALE + k]
        flat = state[_FLAT + k] != float32(0)
        state[SCALE + k] = float32(0) if flat else scale
        state[WON_ISCALE + k] = float32(0) if flat else iscale


@helper
def _begin_scale_min(state: Array, size: int) -> None:
    """Find smallest (at most 0) and largest x, and the sums of w and w x."""
    for k in range(LANES):
        x, w = state[X + k], state[W + k]
        state[MIN + k] = x
        state[PEAK + k] = x
        state[_SUM_W + k] = w
        state[_SUM_X + k] = w * x
    for i in range(1, size):
        for k in range(LANES):
            x, w = state[X + i * LANES + k], state[W + i * LANES + k]
            low, high = state[MIN + k], state[PEAK + k]
            state[MIN + k] = x if x < low else low  # noqa: FURB136 - as ggml treats -0
            state[PEAK + k] = x if x > high else high  # noqa: FURB136 - as ggml treats -0
            state[_SUM_W + k] += w
            state[_SUM_X + k] += w * x
    for k in range(LANES):
        low = state[MIN + k]
        low = float32(0) if low > float32(0) else low  # noqa: FURB136 - as ggml treats -0
        state[MIN + k] = low
        state[_FLAT + k] = float32(1) if low == state[PEAK + k] else float32(0)


@helper
def _try_levels(state: Array, size: int, levels: int) -> None:
    """Find the levels of the candidate inverse scale, and their sums.

    An infinite inverse scale gives only zeros, as ggml's rounding of the bits of Inf and NaN does.
    """
    top = float32(levels)
    for k in range(LANES):
        state[_SUM_L + k] = float32(0)
        state[_SUM_L2 + k] = float32(0)
        state[_SUM_XL + k] = float32(0)
    for start in range(0, size, _UNROLLED):
        for k in range(LANES):
            iscale, low = state[_ISCALE + k], state[MIN + k]
            iscale = iscale if abs(iscale) < float32(np.inf) else float32(0)
            sum_l, sum_l2, sum_xl = state[_SUM_L + k], state[_SUM_L2 + k], state[_SUM_XL + k]
            for i in range(_UNROLLED):
                at = (start + i) * LANES + k
                x = state[X + at]
                level = rounded(iscale * (x - low), float32(0), top)
                state[LEVELS + at] = level
                weighted = state[W + at] * level
                sum_l += weighted
                sum_l2 += weighted * level
                sum_xl += weighted * x
            state[_SUM_L + k] = sum_l
            state[_SUM_L2 + k] = sum_l2
            state[_SUM_XL + k] = sum_xl


@helper
def _solve(state: Array) -> None:
    """Find the least-squares scale and minimum for the levels; the minimum is at most 0."""
    for k in range(LANES):
        sum_l, sum_l2, sum_xl = state[_SUM_L + k], state[_SUM_L2 + k], state[_SUM_XL + k]
        sum_w, sum_x = state[_SUM_W + k], state[_SUM_X + k]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = low > float32(0)
        state[_TRY_MIN + k] = float32(0) if positive else low
        state[_TRY_SCALE + k] = sum_xl / sum_l2 if positive else scale
        state[_SUM_L + k] = determinant  # its sign decides whether the candidate counts


@helper
def _measure(state: Array, size: int, absolute: bool) -> None:
    """Add up the weighted error of the candidate."""
    for k in range(LANES):
        state[_ERROR + k] = float32(0)
    for start in range(0, size, _UNROLLED):
        for k in range(LANES):
            scale, low, error = state[_TRY_SCALE + k], state[_TRY_MIN + k], state[_ERROR + k]
            for i in range(_UNROLLED):
                at = (start + i) * LANES + k
                gap = scale * state[LEVELS + at] + low - state[X + at]
                gap = abs(gap) if absolute else gap * gap
                error += state[W + at] * gap
            state[_ERROR + k] = error


@helper
def _keep_better(state: Array) -> None:
    """Keep the candidate in the lanes where its error is smaller."""
    for k in range(LANES):
        error, best = state[_ERROR + k], state[_BEST + k]
        scale, low = state[SCALE + k], state[MIN + k]
        won_iscale, won_min = state[WON_ISCALE + k], state[WON_MIN + k]
        new_scale, new_low, iscale = state[_TRY_SCALE + k], state[_TRY_MIN + k], state[_ISCALE + k]
        won = (state[_SUM_L + k] > float32(0)) & (error < best)
        state[_BEST + k] = error if won else best
        state[SCALE + k] = new_scale if won else scale
        state[WON_ISCALE + k] = iscale if won else won_iscale
        state[WON_MIN + k] = low if won else won_min
        state[MIN + k] = new_low if won else low


@helper
def _find_extreme(state: Array, size: int) -> None:
    """Find the largest |x| of each lane and the first x that has it."""
    for k in range(LANES):
        state[PEAK + k] = float32(0)
        state[EXTREME + k] = float32(0)
    for i in range(size):
        for k in range(LANES):
            x, peak, extreme = state[X + i * LANES + k], state[PEAK + k], state[EXTREME + k]
            larger = abs(x) > peak
            state[PEAK + k] = abs(x) if larger else peak
            state[EXTREME + k] = x if larger else extreme


@helper
def search_scale(state: Array, size: int, half: int) -> None:
    """Find the scale of levels -half ... half - 1 (Q6_K); each x is weighted by its square.

    Candidates are the inverse scales -(half + n / 10) / extreme for n = -9 ... 9.
    """
    _find_extreme(state, size)
    _begin_candidate(state, -float32(half))
    _fit_levels(state, size, half)
    _keep_first(state)
    for n in range(-9, 10):
        if n != 0:  # ggml tries 0 first: done above
            _begin_candidate(state, -float32(float32(half) + float32(float32(0.1) * float32(n))))
            _fit_levels(state, size, half)
            _keep_steeper(state)
    _zero_tiny(state)


@helper
def _begin_candidate(state: Array, numerator: Any) -> None:
    for k in range(LANES):
        state[_ISCALE + k] = numerator / state[EXTREME + k]
        state[_SUM_XL + k] = float32(0)
        state[_SUM_L2 + k] = float32(0)


@helper
def _fit_levels(state: Array, size: int, half: int) -> None:
    """Add up w x l and w l^2 for the levels of the candidate."""
    low, high = float32(-half), float32(half - 1)
    for start in range(0, size, _UNROLLED):
        for k in range(LANES):
            sum_xl, sum_l2 = state[_SUM_XL + k], state[_SUM_L2 + k]
            for i in range(_UNROLLED):
                x = state[X + (start + i) * LANES + k]
                level = rounded(state[_ISCALE + k] * x, low, high)
                w = x * x
                sum_xl += w * x * level
                sum_l2 += w * level * level
            state[_SUM_XL + k] = sum_xl
            state[_SUM_L2 + k] = sum_l2


@helper
def _keep_first(state: Array) -> None:
    """Keep the first candidate, whatever its error."""
    for k in range(LANES):
        sum_xl, sum_l2, iscale = state[_SUM_XL + k], state[_SUM_L2 + k], state[_ISCALE + k]
        scale = sum_xl / sum_l2
        scale = float32(0) if sum_l2 == float32(0) else scale
        state[SCALE + k] = scale
        state[_BEST + k] = scale * sum_xl
        state[WON_ISCALE + k] = iscale


@helper
def _keep_steeper(state: Array) -> None:
    """Keep the candidate where (sum x l)^2 / (sum l^2) is larger."""
    for k in range(LANES):
        sum_xl, sum_l2, best = state[_SUM_XL + k], state[_SUM_L2 + k], state[_BEST + k]
        old_scale, old_iscale, iscale = state[SCALE + k], state[WON_ISCALE + k], state[_ISCALE + k]
        won = (sum_l2 > float32(0)) & (sum_xl * sum_xl > best * sum_l2)
        scale = sum_xl / sum_l2
        state[SCALE + k] = scale if won else old_scale
        state[_BEST + k] = scale * sum_xl if won else best
        state[WON_ISCALE + k] = iscale if won else old_iscale


@helper
def _zero_tiny(state: Array) -> None:
    for k in range(LANES):
        peak, scale = state[PEAK + k], state[SCALE + k]
        state[SCALE + k] = float32(0) if peak < TINY else scale


@helper
def search_scale_moving(state: Array, size: int, half: int) -> None:
    """Find the scale of levels -half ... half - 1 (Q3_K), moving single levels while that helps.

    The final levels are at LEVELS.
    """
    _begin_moving(state, size, half)
    _go_on_moving(state, size, half, 5)


@helper
def search_scales_moving(parts: Array, size: int, half: int, state: Array, scales: Array) -> None:
    """Fill `scales` with the result of `search_scale_moving` for each sub-block of `parts`.

    Four of five sub-blocks converge in the first round. The others are restarted together, which
    takes less time than to move the contents of lanes.
    """
    numbers = np.arange(parts.shape[0])
    for rounds in _STAGES:
        count = 0
        for first in range(0, numbers.size, LANES):
            gather_lanes(parts, numbers, first, size, state)
            _begin_moving(state, size, half)
            _go_on_moving(state, size, half, rounds)
            for k in range(min(LANES, numbers.size - first)):
                number = numbers[first + k]
                scales[number] = state[SCALE + k]
                numbers[count] = number
                count += state[_FLAT + k] != float32(0)
        numbers = numbers[:count]


@helper
def _begin_moving(state: Array, size: int, half: int) -> None:
    """Find the levels for the scale of the largest |x|, and their sums."""
    _find_extreme(state, size)
    _begin_candidate(state, float32(-half))
    low, high = float32(-half), float32(half - 1)
    for start in range(0, size, _UNROLLED):
        for k in range(LANES):
            sum_xl, sum_l2 = state[_SUM_XL + k], state[_SUM_L2 + k]
            for i in range(_UNROLLED):
                x = state[X + (start + i) * LANES + k]
                level = rounded(state[_ISCALE + k] * x, low, high)
                state[LEVELS + (start + i) * LANES + k] = level
                w = x * x
                sum_xl += w * x * level
                sum_l2 += w * level * level
            state[_SUM_XL + k] = sum_xl
            state[_SUM_L2 + k] = sum_l2


@helper
def _go_on_moving(state: Array, size: int, half: int, rounds: int) -> None:
    """Move levels for `rounds` rounds, or until all converge; then compute the scales."""
    for _ in range(rounds):
        if not _move_levels(state, size, half):
            break
    _end_moving(state)


@helper
def _end_moving(state: Array) -> None:
    for k in range(LANES):
        sum_xl, sum_l2 = state[_SUM_XL + k], state[_SUM_L2 + k]
        state[SCALE + k] = sum_xl / sum_l2 if sum_l2 > float32(0) else float32(0)
    _zero_tiny(state)


@helper
def _move_levels(state: Array, size: int, half: int) -> bool:
    """Move each level if that improves the fit; return whether any level moved.

    Every move increases (sum x l)^2 / (sum l^2), so a change of the sums shows a move.
    """
    for k in range(LANES):
        state[_SUM_X + k] = state[_SUM_XL + k]
        state[_SUM_L + k] = state[_SUM_L2 + k]
    for i in range(size):
        for k in range(LANES):
            x, level = state[X + i * LANES + k], state[LEVELS + i * LANES + k]
            sum_xl, sum_l2 = state[_SUM_XL + k], state[_SUM_L2 + k]
            w = x * x
            rest_xl = sum_xl - w * x * level
            rest_l2 = sum_l2 - w * level * level
            moved = float32(clamped(x * rest_l2 / rest_xl, -half, half - 1))
            new_xl = rest_xl + w * x * moved
            new_l2 = rest_l2 + w * moved * moved
            better = new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            moves = (rest_xl > float32(0)) & (moved != level) & (new_l2 > float32(0)) & better
            state[LEVELS + i * LANES + k] = moved if moves else level
            state[_SUM_XL + k] = new_xl if moves else sum_xl
            state[_SUM_L2 + k] = new_l2 if moves else sum_l2
    moved_any = False
    for k in range(LANES):
        same_xl = state[_SUM_X + k] == state[_SUM_XL + k]
        rests = same_xl & (state[_SUM_L + k] == state[_SUM_L2 + k])
        state[_FLAT + k] = float32(0) if rests else float32(1)
        moved_any |= not rests
    return moved_any


@helper
def search_scale_iq4(state: Array, size: int) -> None:
    """Find the scale of IQ4's sixteen values; each x is weighted by its square.

    Candidates are the inverse scales (n - 127) / extreme for n = -7 ... 7.
    """
    _find_extreme(state, size)
    for n in range(-8, 8):
        for k in range(LANES):
            extreme = state[EXTREME + k]
            first = float32(1) / (-extreme / IQ4_VALUES[0])
            state[_ISCALE + k] = first if n == -8 else float32(float32(n) + IQ4_VALUES[0]) / extreme
            state[_SUM_XL + k] = float32(0)
            state[_SUM_L2 + k] = float32(0)
        for i in range(size):
            for k in range(LANES):
                x = state[X + i * LANES + k]
                scaled = state[_ISCALE + k] * x
                value = IQ4_VALUES[0]
                for step in range(15):
                    value += float32(0) if scaled < IQ4_MIDDLES[step] else IQ4_STEPS[step]
                w = x * x
                state[_SUM_XL + k] += w * value * x
                state[_SUM_L2 + k] += w * value * value
        if n == -8:
            _keep_first(state)
        else:
            _keep_steeper(state)
    _zero_tiny(state)


@helper
def iq4_index(scaled: Any) -> Any:
    """Return the index of the nearest of IQ4's values; of two the upper one, for NaN the last."""
    index = 15
    for step in range(15):
        index -= scaled < IQ4_MIDDLES[step]
    return index
