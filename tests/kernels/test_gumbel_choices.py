"""The Triton kernel of the noise's choices against the core."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from kernel_cases import generator, hard_logits, kernel_device, some_seeds
from sjd_vllm.core import gumbel_choices as core_choices
from sjd_vllm.core import process_target
from sjd_vllm.engine.kernels import gumbel_choices_cuda, has_kernels

DEVICE = kernel_device()

from sjd_kernels.gumbel_choices import gumbel_choices  # noqa: E402  # needs triton


def both(logits: torch.Tensor, first: int, num_columns: int, **per_row: Any) -> tuple[list[int], list[int]]:
    on_device = {name: value.to(DEVICE) for name, value in per_row.items()}
    kernel = gumbel_choices(logits.to(DEVICE), first, num_columns, **on_device)
    legal = torch.arange(first, first + num_columns)
    rows, uncond_rows = per_row.pop("rows"), per_row.pop("uncond_rows")
    columns = logits[:, legal].float()
    core = core_choices(columns[rows], legal, uncond_logits=columns[uncond_rows], **per_row)
    return kernel.tolist(), core.tolist()


def plain(num_rows: int) -> dict[str, torch.Tensor]:
    rows, ones, none = torch.arange(num_rows), torch.ones(num_rows), torch.zeros(num_rows, dtype=torch.long)
    return {
        "rows": rows,
        "uncond_rows": rows,
        "guidance_scale": ones,
        "temperature": ones,
        "top_k": none,
        "seeds": none,
        "positions": rows,
    }


@pytest.mark.parametrize("num_columns", [1, 3, 1023, 1026, 4097])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("normal", torch.float32),
        ("normal", torch.bfloat16),
        ("coarse", torch.float32),
        ("equal", torch.float16),
        ("forbidden", torch.bfloat16),
        ("huge", torch.float32),
    ],
    ids=str,
)
def test_equals_the_core(num_columns: int, kind: str, dtype: torch.dtype) -> None:
    num_rows, first = 7, num_columns % 5
    logits = hard_logits(kind, (2 * num_rows, num_columns + 9), num_columns).to(dtype)
    rows = torch.randperm(num_rows, generator=generator(3))
    kernel, core = both(
        logits,
        first,
        num_columns,
        rows=rows,
        uncond_rows=rows + num_rows,
        guidance_scale=torch.tensor([1.0, 3.0, 0.3, 7.5, 1.0, 2.0, 0.0]),
        temperature=torch.tensor([1.0, 0.5, 1.0, 2.0, 0.0, 1e-3, 1.0]),
        top_k=torch.tensor([0, 1, 50, 2000, 3, -1, 5000]),
        seeds=some_seeds(num_rows, 5),
        positions=torch.randint(10**6, (num_rows,), generator=generator(6)),
    )
    assert kernel == core


@pytest.mark.parametrize("num_rows", [65])
def test_many_rows_differ_from_the_core_by_near_ties_alone(num_rows: int) -> None:
    per_row = plain(num_rows) | {"seeds": some_seeds(num_rows, 1), "top_k": torch.full((num_rows,), 300)}
    logits = hard_logits("normal", (num_rows, 1026), 8)
    kernel, core = both(logits, 0, 1026, **per_row)
    assert sum(a != b for a, b in zip(kernel, core, strict=True)) == 0  # a near-tie takes some 1e6 draws


def test_rows_that_are_no_distribution_have_no_choice() -> None:
    logits = torch.zeros(4, 8)
    logits[0, 5], logits[1], logits[3, 0] = torch.nan, -torch.inf, torch.nan
    per_row = plain(4) | {"top_k": torch.tensor([0, 2, 0, 2])}
    kernel, core = both(logits, 0, 8, **per_row)
    assert kernel == core
    assert [token < 0 for token in kernel] == [True, True, False, True]


def test_the_law_is_that_of_the_target() -> None:
    num_rows, num_columns = 1500, 6
    one = torch.tensor([[0.1, 1.0, -1.0, 0.5, 2.0, -3.0]])
    per_row = plain(num_rows) | {
        "rows": torch.zeros(num_rows, dtype=torch.long),
        "uncond_rows": torch.zeros(num_rows, dtype=torch.long),
        "top_k": torch.full((num_rows,), 4),
        "seeds": torch.full((num_rows,), 7),
    }
    on_device = {name: value.to(DEVICE) for name, value in per_row.items()}
    chosen = gumbel_choices(one.to(DEVICE), 0, num_columns, **on_device).cpu()
    counts = torch.bincount(chosen, minlength=num_columns)
    target = process_target(one[None], top_k=4)[0, 0]
    assert int(counts[target == 0].sum()) == 0
    kept = target > 0
    expected = target[kept].double() / target[kept].double().sum() * num_rows
    assert chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-4
    flat = (0.8 * one).softmax(-1)[0][kept].double()  # the negative control: another temperature
    assert chisquare(counts[kept].numpy(), (flat / flat.sum() * num_rows).numpy()).pvalue < 1e-4


@pytest.mark.parametrize(
    ("logits", "first", "num_columns", "change", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), 0, 8, {}, "must be float32, bfloat16"),
        (torch.zeros(8, 2).T, 0, 8, {}, "contiguous columns"),
        (torch.zeros(2, 8), 4, 5, {}, r"no columns 4\.\.9 in 8"),
        (torch.zeros(2, 8), 0, 0, {}, "no columns"),
        (torch.zeros(2, 8), 0, 8, {"seeds": torch.zeros(2)}, r"seeds must be int64 \[2\]"),
        (torch.zeros(2, 8), 0, 8, {"top_k": torch.zeros(3, dtype=torch.long)}, r"top_k must be int64 \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(logits: Any, first: int, num_columns: int, change: Any, message: str) -> None:
    on_device = {name: value.to(DEVICE) for name, value in {**plain(2), **change}.items()}
    with pytest.raises(ValueError, match=message):
        gumbel_choices(logits.to(DEVICE), first, num_columns, **on_device)


def test_the_engine_asks_the_kernel() -> None:
    logits = hard_logits("normal", (4, 100), 2)
    per_row = plain(2) | {"uncond_rows": torch.tensor([2, 3]), "guidance_scale": torch.tensor([2.0, 3.0])}
    on_device = {name: value.to(DEVICE) for name, value in per_row.items()}
    found = gumbel_choices_cuda(logits.to(DEVICE), 10, 80, **on_device)
    assert found.tolist() == both(logits, 10, 80, **per_row)[1]


def test_the_engine_has_kernels_on_a_gpu_alone() -> None:
    assert has_kernels(torch.device("cuda"))
    assert not has_kernels(torch.device("cpu"))
