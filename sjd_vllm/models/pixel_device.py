"""Pixel decoders on the device that their family was told to use, in full float32 on any.

They decode a few pictures at a time and bring each slice back to the CPU, so a batch takes no more memory than a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def decode_on(device: torch.device, vq: Any, codes: Tensor) -> Tensor:
    """Pixels of codes, on the CPU, computed on a device; the decoder moves there the first time.

    Args:
        vq: an autoencoder with `to` and `decode`, as a module of PyTorch has.
        codes: long [B, rows, columns].
    """
    with full_float32():
        pixels: Tensor = vq.to(device).decode(codes.to(device)).cpu()
    return pixels


def encode_on(device: torch.device, vq: Any, pixels: Tensor) -> Tensor:
    """Codes of pixels, on the CPU, computed on a device.

    Args:
        vq: an autoencoder with `to` and `encode`.
        pixels: float32 [B, 3, height, width].
    """
    with full_float32():
        codes: Tensor = vq.to(device).encode(pixels.to(device)).cpu()
    return codes


@contextmanager
def full_float32() -> Iterator[None]:
    """cuDNN convolutions without TF32, which PyTorch allows by default and which is 1e-3 off; nothing on a CPU."""
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
