"""`sjd_vllm.core.sweep` on a CPU: a compiled loop instead of small operators, which cost more to start than to do."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]


def sweep_cpu(drafts: Array, rows: Array, positions: Array, choices: Array, starts: Array) -> Array:
    """Put the choices in place of the drafts, and say how many of them are final -> int64 [R], at least 1.

    As the core's, with arrays: drafts int64 [*, T], changed in place; rows, positions, choices int64 [N]; starts int64
    [R], ascending from 0. Raises IndexError for a row or position that `drafts` does not have.
    """
    for index, size in zip((rows, positions), drafts.shape, strict=True):
        if len(index) and not 0 <= index.min() <= index.max() < size:
            raise IndexError(f"rows and positions must be in {drafts.shape}")
    num_final = np.empty(len(starts), np.int64)
    _sweep(drafts, rows, positions, choices, starts, num_final)
    return num_final


def compile_now() -> None:
    """Compile, or load what an earlier process compiled, before the first request has to wait for it."""
    zeros = np.zeros(1, np.int64)
    sweep_cpu(np.zeros((1, 1), np.int64), zeros, zeros, zeros, zeros)


@numba.njit(cache=True, nogil=True)
def _sweep(drafts, rows, positions, choices, starts, num_final):  # type: ignore[no-untyped-def]  # numba reads none
    for request in range(len(starts)):
        begin = starts[request]
        end = starts[request + 1] if request + 1 < len(starts) else len(rows)
        num_final[request] = end - begin
        is_final = True
        for n in range(begin, end):
            old = drafts[rows[n], positions[n]]
            if choices[n] >= 0:
                drafts[rows[n], positions[n]] = choices[n]
            if is_final and old != choices[n]:
                num_final[request] = n - begin + 1
                is_final = False
