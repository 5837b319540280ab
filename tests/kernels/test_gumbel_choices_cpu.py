"""The compiled choices on a CPU against those of the core."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sjd_kernels.gumbel_choices_cpu import gumbel_choices_cpu
from sjd_vllm.core import gumbel_choices
from sjd_vllm.core.randomness import gumbel_noise


def both(logits: torch.Tensor, first: int, num_columns: int, **per_row: Any) -> tuple[list[int], list[int]]:
    compiled = gumbel_choices_cpu(logits.numpy(), first, num_columns, **per_row)
    legal = torch.arange(first, first + num_columns)
    tensors = {name: torch.from_numpy(value) for name, value in per_row.items()}
    rows, uncond_rows = tensors.pop("rows"), tensors.pop("uncond_rows")
    core = gumbel_choices(logits[rows][:, legal], legal, uncond_logits=logits[uncond_rows][:, legal], **tensors)
    return compiled.tolist(), core.tolist()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_columns=st.sampled_from([1, 2, 3, 31, 257, 1023, 4097]),
    kind=st.sampled_from(["normal", "coarse", "equal", "forbidden", "huge"]),
    scales=st.sampled_from([(1.0,), (3.0,), (0.3, 1.0, 7.5)]),
    temperatures=st.sampled_from([(1.0,), (0.0, 0.5, 2.0)]),
    top_ks=st.sampled_from([(0,), (1,), (100,), (5000,), (0, 2, 50)]),
)
def test_equals_the_core(
    seed: int,
    num_columns: int,
    kind: str,
    scales: tuple[float, ...],
    temperatures: tuple[float, ...],
    top_ks: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_rows, first = 6, seed % 7
    logits = 3 * torch.randn(2 * num_rows, num_columns + 9, generator=generator)
    if kind == "coarse":  # as from bfloat16: many equals, at the border of top-k too
        logits = logits.round()
    elif kind == "equal":
        logits.fill_(0.5)
    elif kind == "forbidden":
        logits[:, torch.rand(logits.shape[1], generator=generator) < 0.5] = -torch.inf
    elif kind == "huge":
        logits *= 1e4
    rows = torch.randperm(num_rows, generator=generator).numpy()
    per_row = {
        "rows": rows,
        "uncond_rows": rows + num_rows,
        "guidance_scale": np.resize(np.array(scales, np.float32), num_rows),
        "temperature": np.resize(np.array(temperatures, np.float32), num_rows),
        "top_k": np.resize(np.array(top_ks), num_rows),
        "seeds": torch.randint(-(2**62), 2**62, (num_rows,), generator=generator).numpy(),
        "positions": torch.randint(10**6, (num_rows,), generator=generator).numpy(),
    }
    compiled, core = both(logits, first, num_columns, **per_row)
    for row, (chosen, expected) in enumerate(zip(compiled, core, strict=True)):
        if chosen != expected:  # two scores that differ by a rounding error, which is rare
            gap = abs(score(logits, per_row, row, chosen) - score(logits, per_row, row, expected))
            assert gap < 1e-5, (row, chosen, expected, gap)


def score(logits: torch.Tensor, per_row: dict[str, Any], row: int, token: int) -> float:
    """What the choice is the highest of, in float64."""
    cond, uncond = (float(logits[per_row[half][row], token]) for half in ("rows", "uncond_rows"))
    scale, temperature = float(per_row["guidance_scale"][row]), float(per_row["temperature"][row])
    mixed = cond if scale == 1 else uncond + scale * (cond - uncond)
    if temperature <= 0:
        return mixed
    key = [torch.tensor([int(per_row[name][row])]) for name in ("seeds", "positions")]
    return mixed / temperature + float(gumbel_noise(*key, torch.tensor([token]), torch.float64))


def plain(num_rows: int) -> dict[str, Any]:
    rows = np.arange(num_rows)
    ones = np.ones(num_rows, np.float32)
    none = np.zeros(num_rows, np.int64)
    return {
        "rows": rows,
        "uncond_rows": rows,
        "guidance_scale": ones,
        "temperature": ones,
        "top_k": none,
        "seeds": none,
        "positions": rows,
    }


def test_rows_that_are_no_distribution_have_no_choice() -> None:
    logits = torch.zeros(3, 8)
    logits[0, 5], logits[1] = torch.nan, -torch.inf
    assert (gumbel_choices_cpu(logits.numpy(), 0, 8, **plain(3)) < 0).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("logits", "first", "num_columns", "change", "message"),
    [
        (np.zeros((2, 8)), 0, 8, {}, "must be float32"),
        (np.zeros((2, 8), np.float32), 4, 5, {}, "no columns 4..9 in 8"),
        (np.zeros((2, 8), np.float32), 0, 0, {}, "no columns"),
        (np.zeros((2, 8), np.float32), 0, 8, {"rows": np.array([0, 2])}, "rows must be from 0 to 1"),
        (np.zeros((2, 8), np.float32), 0, 8, {"uncond_rows": np.array([-1, 0])}, "rows must be from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(logits: Any, first: int, num_columns: int, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gumbel_choices_cpu(logits, first, num_columns, **{**plain(2), **change})
