"""The Triton kernel of verification and refresh against the core's step under `coupled`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_cases import generator, kernel_device, some_seeds
from sjd_vllm.core import CounterNoise, DraftWindow, get_first_guess, get_redraft, jacobi_step

DEVICE = kernel_device()

from sjd_kernels.verify_and_refresh import Verified, verify_and_refresh  # noqa: E402  # needs triton


def case(num_columns: int, width: int, num_requests: int, seed: int, noise: float) -> dict[str, torch.Tensor]:
    random = generator(seed)
    target = torch.randn(num_requests, width + 1, num_columns, generator=random)
    draft = target[:, :width] + noise * torch.randn(num_requests, width, num_columns, generator=random)
    target, draft = target.softmax(-1), draft.softmax(-1)
    tokens = torch.multinomial(draft.reshape(-1, num_columns), 1, generator=random) if width else torch.zeros(0)
    return {
        "target_probs": target,
        "draft_tokens": tokens.view(num_requests, width).long(),
        "draft_probs": draft,
        "lengths": (width - torch.arange(num_requests) % 3).clamp(min=0),
        "positions": 7 * torch.arange(num_requests),
        "next_lengths": torch.arange(num_requests).flip(0).clamp(max=width),
        "seeds": some_seeds(num_requests, seed),
        "iterations": torch.arange(num_requests),
    }


def kernel(inputs: dict[str, torch.Tensor]) -> Verified:
    return Verified(*(value.cpu() for value in verify_and_refresh(**{n: v.to(DEVICE) for n, v in inputs.items()})))


def core(inputs: dict[str, torch.Tensor]) -> Verified:
    width = inputs["draft_tokens"].shape[1]
    result = jacobi_step(
        inputs["target_probs"],
        DraftWindow(inputs["draft_tokens"], inputs["draft_probs"], inputs["lengths"]),
        positions=inputs["positions"],
        next_lengths=inputs["next_lengths"],
        next_width=width,
        redraft=get_redraft("coupled"),
        first_guess=get_first_guess("uniform"),
        randomness=CounterNoise(inputs["seeds"], inputs["iterations"]),
    )
    refreshed = torch.full_like(result.tokens, -1)
    for request, accepted in enumerate(result.num_accepted.tolist()):
        count = min(int(inputs["lengths"][request]) - accepted, int(inputs["next_lengths"][request]))
        refreshed[request, accepted + 1 : accepted + 1 + count] = result.window.tokens[request, :count]
    return Verified(result.num_accepted, result.tokens, refreshed)


@pytest.mark.parametrize("num_columns", [1, 3, 1023, 4097])
@pytest.mark.parametrize(("width", "num_requests"), [(0, 1), (1, 5), (4, 5)])
@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_equals_the_core(num_columns: int, width: int, num_requests: int, noise: float) -> None:
    inputs = case(num_columns, width, num_requests, num_columns + width, noise)
    for found, expected in zip(kernel(inputs), core(inputs), strict=True):
        assert found.tolist() == expected.tolist()


def test_a_long_window_and_drafts_that_were_never_made() -> None:
    inputs = case(31, 64, 3, 5, 0.2)
    inputs["draft_tokens"][1, 2] = -1
    inputs["draft_probs"][1, 2] = 0
    found, expected = kernel(inputs), core(inputs)
    assert [value.tolist() for value in found] == [value.tolist() for value in expected]
    assert found.num_accepted[1] <= 2


def test_rows_without_mass_or_with_nan_give_no_token() -> None:
    inputs = case(9, 1, 2, 5, 0.2)
    inputs["target_probs"][0], inputs["target_probs"][1] = 0, torch.nan
    found = kernel(inputs)
    assert [value.tolist() for value in found] == [value.tolist() for value in core(inputs)]
    assert found.emitted[:, 0].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_probs": torch.zeros(2, 9)}, r"must be \[R, W\+1, V\]"),
        ({"draft_probs": torch.zeros(2, 2, 9)}, r"draft_probs must be float32 \[2, 1, 9\]"),
        ({"lengths": torch.zeros(2)}, r"lengths must be int64 \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel({**case(9, 1, 2, 5, 0.2), **change})
