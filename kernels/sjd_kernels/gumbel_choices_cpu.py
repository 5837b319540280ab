"""`sjd_vllm.core.gumbel_choices` on a CPU: one compiled pass over the logits, by numba.

The same hash, the same order of operations and the same rules for equals as the core; the result can differ from the
core's only where two tokens' scores are within a rounding error of each other.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite.binding import ffi
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_SEED_SALT = np.uint64(0x8BB84B93962EACC9)
_GUMBEL_SALT = np.uint64(0x2D358DCCAA6C78A5)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_LOW_63 = np.uint64((1 << 63) - 1)
_LARGEST_U = np.float32(1.0 - 2.0**-24)
_NUM_BINS = 512
_TINY = float(np.finfo(np.float32).tiny)

Array = NDArray[np.generic]


class _LibraryHandle(type(ffi.lib)):  # type: ignore[misc]
    """llvmlite's handle answers every attribute with a function of its library, `__dict__` too.

    A worker of vLLM 0.32's CPU build reads vars() of everything in every module when it starts, and would die of that.
    """

    __slots__ = ()
    __dict__ = property(lambda self: {})


ffi.lib.__class__ = _LibraryHandle


def gumbel_choices_cpu(
    logits: Array,
    first_token_id: int,
    num_columns: int,
    *,
    rows: Array,
    uncond_rows: Array,
    guidance_scale: Array,
    temperature: Array,
    top_k: Array,
    seeds: Array,
    positions: Array,
) -> Array:
    """The token that the noise picks in each of N rows -> int64 [N]; -1 where the logits are NaN or all -inf.

    logits: float32 [M, vocabulary], C-contiguous rows. The legal tokens are the `num_columns` from `first_token_id` on.
    rows, uncond_rows: int64 [N], into logits; the same where there is no guidance.
    guidance_scale, temperature: float32 [N]; scale 1 is exactly the conditional row, temperature 0 is greedy.
    top_k: int64 [N]; 0 is all.
    seeds, positions: int64 [N]; keys of the noise.

    Raises ValueError for logits of another type and for columns or rows that they do not have.
    """
    if logits.dtype != np.float32 or logits.ndim != 2:
        raise ValueError(f"logits must be float32 [M, vocabulary], got {logits.dtype} {logits.shape}")
    if not 0 <= first_token_id <= first_token_id + num_columns <= logits.shape[1] or num_columns < 1:
        raise ValueError(f"no columns {first_token_id}..{first_token_id + num_columns} in {logits.shape[1]}")
    for index in (rows, uncond_rows):
        if len(index) and not 0 <= index.min() <= index.max() < len(logits):
            raise ValueError(f"rows must be from 0 to {len(logits) - 1}")
    out = np.empty(len(rows), np.int64)
    _choose(
        logits,
        first_token_id,
        num_columns,
        rows,
        uncond_rows,
        guidance_scale,
        temperature,
        top_k,
        seeds.view(np.uint64),
        positions.view(np.uint64),
        out,
    )
    return out


def compile_now() -> None:
    """Compile, or load what an earlier process compiled, before the first request has to wait for it."""
    rows, ones = np.zeros(1, np.int64), np.ones(1, np.float32)
    gumbel_choices_cpu(
        np.zeros((1, 2), np.float32),
        0,
        2,
        rows=rows,
        uncond_rows=rows,
        guidance_scale=ones,
        temperature=ones,
        top_k=rows,
        seeds=rows,
        positions=rows,
    )


@numba.njit(cache=True, nogil=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]  # numba reads no annotations
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _kth_highest(values, k, lowest, highest, bins, scratch):  # type: ignore[no-untyped-def]
    """The k-th highest value, by counting in bins and selecting within one; lowest and highest are the finite range."""
    if highest <= lowest:
        num_finite = 0
        for value in values:
            num_finite += value > -np.inf
        return highest if num_finite >= k else np.float32(-np.inf)
    scale = np.float32(_NUM_BINS - 1) / (highest - lowest)
    bins[:] = 0
    num_finite = 0
    for value in values:
        if value > -np.inf:
            num_finite += 1
            bins[int((value - lowest) * scale)] += 1
    if num_finite < k:
        return np.float32(-np.inf)
    place, rank = _NUM_BINS - 1, k
    while bins[place] < rank:
        rank -= bins[place]
        place -= 1
    count = 0
    for value in values:
        if value > -np.inf and int((value - lowest) * scale) == place:
            scratch[count] = value
            count += 1
    # the rank-th highest of scratch[:count]: quickselect (Hoare 1961)
    low, high, target = 0, count - 1, rank - 1
    while low < high:
        pivot = scratch[(low + high) // 2]
        left, right = low, high
        while left <= right:
            while scratch[left] > pivot:
                left += 1
            while scratch[right] < pivot:
                right -= 1
            if left <= right:
                scratch[left], scratch[right] = scratch[right], scratch[left]
                left += 1
                right -= 1
        if target <= right:
            high = right
        elif target >= left:
            low = left
        else:
            break
    return scratch[target]


@numba.njit(cache=True, nogil=True)
def _choose(  # type: ignore[no-untyped-def]
    logits, first, num_columns, rows, uncond_rows, scales, temperatures, top_ks, seeds, positions, out
):
    mixed = np.empty(num_columns, np.float32)
    scratch = np.empty(num_columns, np.float32)
    bins = np.empty(_NUM_BINS, np.int64)
    for n in range(len(rows)):
        cond, uncond = logits[rows[n]], logits[uncond_rows[n]]
        scale, temperature = scales[n], temperatures[n]
        has_nan, lowest, highest, highest_at = False, np.float32(np.inf), np.float32(-np.inf), -1
        for column in range(num_columns):
            value = cond[first + column]
            if scale != np.float32(1) and value != -np.inf:
                # torch.lerp's two branches, which are exact at either end
                other = uncond[first + column]
                if abs(scale) < np.float32(0.5):
                    value = other + scale * (value - other)
                else:
                    value = value - (value - other) * (np.float32(1) - scale)
            has_nan = has_nan or np.isnan(value)
            if value > highest:
                highest, highest_at = value, column
            if lowest > value > -np.inf:
                lowest = value
            mixed[column] = value
        if has_nan or highest_at < 0:
            out[n] = -1
            continue
        if temperature <= np.float32(0):
            out[n] = first + highest_at
            continue

        # what top-k leaves: all above a threshold, and the lowest of the columns that equal it
        threshold, num_tied = np.float32(-np.inf), num_columns
        if 0 < top_ks[n] < num_columns:
            threshold = _kth_highest(mixed, top_ks[n], lowest, highest, bins, scratch)
            num_tied = top_ks[n]
            for column in range(num_columns):
                if mixed[column] > threshold:
                    num_tied -= 1

        key = _mix(_mix(_mix(seeds[n] * _GAMMA + _SEED_SALT) ^ _GUMBEL_SALT) + positions[n] * _GAMMA)
        best, best_at = np.float32(-np.inf), -1
        for column in range(num_columns):
            value = mixed[column]
            if value < threshold or value == -np.inf:
                continue
            if value == threshold:
                if num_tied == 0:
                    continue
                num_tied -= 1
            bits = _mix(key + np.uint64(first + column) * _GAMMA) & _LOW_63
            u = min(np.float32(np.float32(bits) * np.float32(2.0**-63)), _LARGEST_U)
            noise = -np.log(max(-np.log1p(-u), np.float32(_TINY)))
            score = value / temperature + noise
            if score > best:
                best, best_at = score, column
        out[n] = first + best_at if best_at >= 0 else -1
