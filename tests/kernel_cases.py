"""What the tests of the Triton kernels share."""

from __future__ import annotations

import os

import pytest
import torch


def kernel_device() -> torch.device:
    """A GPU where one is at hand, a CPU under Triton's interpreter; the calling module is skipped where neither is."""
    pytest.importorskip("triton", reason="triton is not installed; `make test` runs these tests in a second pass")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels under Triton's interpreter", allow_module_level=True)
    return torch.device("cuda")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_seeds(count: int, seed: int) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=generator(seed))


def hard_logits(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Float32 logits of a kind that an implementation may stumble over."""
    logits = 3 * torch.randn(shape, generator=generator(seed))
    if kind == "coarse":  # many equals, at the border of top-k too; both zeros
        logits = (logits / 2).round()
    elif kind == "equal":
        logits = torch.full(shape, 0.5)
    elif kind == "forbidden":
        logits[..., torch.rand(shape[-1], generator=generator(seed)) < 0.5] = -torch.inf
    elif kind == "huge":
        logits *= 1e4
    return logits
