"""The compiled sweep against the core's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sjd_kernels.sweep_cpu import sweep_cpu
from sjd_vllm.core import sweep

NUM_POSITIONS = 12


@settings(deadline=None)  # the first call compiles
@given(
    windows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, NUM_POSITIONS - 6)), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(1, 3),
)
def test_equals_the_core(windows: list[tuple[int, int]], seed: int, num_tokens: int) -> None:
    """Few tokens, so that drafts are often right; some positions have no choice."""
    random = np.random.default_rng(seed)
    drafts = random.integers(0, num_tokens, (len(windows) + 2, NUM_POSITIONS))
    slots = random.permutation(len(drafts))
    rows = np.concatenate([np.full(width + 1, slots[n]) for n, (width, _) in enumerate(windows)])
    positions = np.concatenate([begin + np.arange(width + 1) for width, begin in windows])
    choices = random.integers(0, num_tokens, len(rows))
    choices[random.random(len(rows)) < 0.1] = -1
    starts = np.cumsum([0, *(width + 1 for width, _ in windows)])[:-1]
    expected_drafts = torch.from_numpy(drafts.copy())
    expected = sweep(expected_drafts, *map(torch.from_numpy, (rows, positions, choices, starts)))
    assert sweep_cpu(drafts, rows, positions, choices, starts).tolist() == expected.tolist()
    assert drafts.tolist() == expected_drafts.tolist()


def test_places_that_do_not_exist_are_refused() -> None:
    drafts, zero = np.zeros((2, 3), np.int64), np.zeros(1, np.int64)
    with pytest.raises(IndexError):
        sweep_cpu(drafts, zero + 2, zero, zero, zero)
    with pytest.raises(IndexError):
        sweep_cpu(drafts, zero, zero + 3, zero, zero)
