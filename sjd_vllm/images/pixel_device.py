"""Where a front door computes pixels: chosen and tried once, beside an engine that has taken its memory."""

from __future__ import annotations

import logging

import torch

from sjd_vllm.config import AUTO, ConfigError
from sjd_vllm.models.family import ImageFamily, ImageSize

# What families decode at once at most; a trial of as many takes the memory that any batch will.
_TRIED_PIXELS = 1 << 20

_LOGGER = logging.getLogger("vllm.sjd_vllm")


def place_pixels(family: ImageFamily, asked: str) -> None:
    """Set the family's `pixel_device` by the setting of that name, and try it with the largest pictures.

    Called when the engine runs: it measures the free memory of its GPU when it starts. PyTorch keeps the memory of the
    trial for this process, so that what fits now fits later.

    Raises ConfigError where a GPU was asked for by name, and there is none or its memory does not suffice. Under "auto"
    the CPU takes its place, with a warning.
    """
    device = torch.device(_automatic() if asked == AUTO else asked)
    if device.type != "cpu" and not torch.cuda.is_available():
        raise ConfigError("pixel_device", f"pixel_device {asked!r} needs a GPU that PyTorch can use; there is none.")
    family.pixel_device = device
    if device.type == "cpu":
        return
    try:
        _try(family)
    except torch.OutOfMemoryError as error:
        family.pixel_device = torch.device("cpu")
        torch.cuda.empty_cache()
        told = (
            "the GPU has no memory for pixels beside the engine; lower gpu_memory_utilization, or set pixel_device "
            f"to 'cpu' ({str(error).splitlines()[0]})"
        )
        if asked != AUTO:
            raise ConfigError("pixel_device", f"{told}.") from error
        _LOGGER.warning("%s; pixels are computed on the CPU", told)


def _automatic() -> str:
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() or not torch.cuda.is_available() else "cuda"


def _try(family: ImageFamily) -> None:
    size = max(family.sizes, key=_num_pixels)
    grammar = family.grammar(size)
    picture = grammar.tokens(torch.zeros(grammar.grid, dtype=torch.long))
    pixels = family.decode_pixels([picture] * -(-_TRIED_PIXELS // _num_pixels(size)), size)
    if family.can_encode:
        family.encode_pixels(pixels[0], size)
    if family.embedded_token_id is not None:
        family.prompt_embeds("a", size)


def _num_pixels(size: ImageSize) -> int:
    return size.width * size.height
