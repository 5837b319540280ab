"""The choices of the noise on a GPU, by the Triton kernel."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run there: on CUDA with triton installed. Elsewhere the core does the same."""
    return device.type == "cuda" and find_spec("triton") is not None


def gumbel_choices_cuda(logits: Tensor, first_token_id: int, num_columns: int, **per_row: Tensor) -> Tensor:
    """`sjd_kernels.gumbel_choices`, which see; imported when called, because triton is not installed everywhere."""
    from sjd_kernels.gumbel_choices import gumbel_choices

    return gumbel_choices(logits, first_token_id, num_columns, **per_row)
