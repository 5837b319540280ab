"""Attention inside pixel decoders: every position of a map looks at every other, with one head.

On a GPU it is xformers' memory-efficient attention where that package is installed, else PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def pixel_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention [B, L, C] over L positions, the scale being C^-0.5."""
    fused = _xformers_attention() if query.is_cuda and query.dtype != torch.float32 else None
    if fused is not None:
        return fused(query, key, value)
    out: Tensor = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    return out


@cache
def _xformers_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        return None
    return memory_efficient_attention  # type: ignore[no-any-return]
