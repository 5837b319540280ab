"""Attention inside pixel decoders: every position of a map looks at every other, with one head.

On a GPU it is xformers' memory-efficient attention where that package is installed, else PyTorch's own. What xformers
takes (0.0.35, xformers/ops/fmha): three dimensions [B, L, C] are one head; channels side by side in memory
(`check_lastdim_alignment_stride1` in common.py) and a multiple of 4 of them; float32 and more than 256 channels in its
CUTLASS kernel alone, up to compute capability 9.0 (cutlass.py, `FwOp`). Where it has no kernel it raises
NotImplementedError, and PyTorch's is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor
from torch.nn import functional as F


def pixel_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention [B, L, C] over L positions, the scale being C^-0.5."""
    if query.is_cuda:
        # Maps have channels outermost; a GPU's fused kernels, PyTorch's too, want them innermost.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        fused = _xformers_attention()
        if fused is not None:
            try:
                return fused(query, key, value)
            except NotImplementedError:
                pass
    out: Tensor = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    return out


@cache
def _xformers_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        return None
    return memory_efficient_attention  # type: ignore[no-any-return]
