"""The Triton kernel of the target processing against the core."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_cases import generator, hard_logits, kernel_device
from sjd_vllm.core import process_target

DEVICE = kernel_device()

from sjd_kernels.process_target import process_target_fused  # noqa: E402  # needs triton

SETTINGS = {
    "guidance_scale": torch.tensor([1.0, 3.0, 0.3, 7.5, 1.0]),
    "temperature": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]),
    "top_k": torch.tensor([0, 2, 50, 1, 5000]),
}


def fused(logits: torch.Tensor, **others: Any) -> torch.Tensor:
    return process_target_fused(logits.to(DEVICE), **{name: value.to(DEVICE) for name, value in others.items()}).cpu()


@pytest.mark.parametrize("num_columns", [1, 3, 1023, 1026, 4097])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("normal", torch.float32), ("coarse", torch.bfloat16), ("equal", torch.float16), ("forbidden", torch.float32)],
    ids=str,
)
def test_equals_the_core(num_columns: int, kind: str, dtype: torch.dtype) -> None:
    logits = hard_logits(kind, (5, 2, num_columns), num_columns).to(dtype)
    uncond = (logits + torch.randn(logits.shape, generator=generator(1)).round()).to(dtype)
    legal = torch.rand(5, 1, num_columns, generator=generator(2)).expand(5, 2, num_columns) < 0.7
    legal[0] = False
    legal[1:, :, 0] = True
    logits[..., 0] = uncond[..., 0] = 0.25  # some legal column has mass
    found = fused(logits, uncond_logits=uncond, legal=legal, **SETTINGS)
    expected = process_target(logits.float(), uncond_logits=uncond.float(), legal=legal, **SETTINGS)
    assert ((found > 0) == (expected > 0)).all()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not found[0].any()


def test_scale_one_does_not_read_the_uncond_half_and_nan_gives_no_distribution() -> None:
    logits = torch.randn(2, 65, 9, generator=generator(4))
    ones, none = torch.ones(2), torch.zeros(2, dtype=torch.long)
    settings = {"guidance_scale": ones, "temperature": ones, "top_k": none}
    uncond = torch.full_like(logits, torch.nan)
    torch.testing.assert_close(fused(logits, uncond_logits=uncond, **settings), logits.softmax(-1))
    guided = fused(logits, uncond_logits=uncond, **settings | {"guidance_scale": torch.tensor([1.0, 2.0])})
    assert guided.isnan().all((1, 2)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uncond_logits": torch.zeros(5, 2, 8)}, "uncond_logits must have the shape"),
        ({"uncond_logits": torch.zeros(5, 2, 7).half()}, "uncond_logits must have the dtype"),
        ({"legal": torch.ones(5, 2, 7)}, "legal must be bool"),
        ({"top_k": torch.zeros(5)}, r"top_k must be int64 \[5\]"),
        ({"temperature": torch.ones(4)}, r"temperature must be float32 \[5\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    logits = torch.zeros(5, 2, 7)
    with pytest.raises(ValueError, match=message):
        fused(logits, **{"uncond_logits": logits, **SETTINGS, **change})
