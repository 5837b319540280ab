"""The choices of the noise on a GPU, by the Triton kernel, for arrays that the host holds."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from sjd_vllm.engine.slot_table import Array


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run there: on CUDA with triton installed. Elsewhere the core does the same."""
    return device.type == "cuda" and find_spec("triton") is not None


def choices(logits: Tensor, first_token_id: int, num_columns: int, **per_row: Array) -> Array:
    """What the noise picks, token ids int64 [N]; -1 where the logits are NaN or all -inf.

    logits: [M, vocabulary] on the device. The other arguments are those of `sjd_kernels.gumbel_choices`, as arrays of
    the host. Waits for the device.
    """
    from sjd_kernels.gumbel_choices import gumbel_choices  # triton is not installed everywhere

    on_device = {name: torch.from_numpy(values).to(logits.device) for name, values in per_row.items()}
    ids: Array = gumbel_choices(logits, first_token_id, num_columns, **on_device).cpu().numpy()
    return ids
