"""The demo family: a small Llama that writes 16 x 16 VQ codes, each row ended by <eol>, the picture by <eoi>."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sjd_vllm.models.demo.prompts import DemoPrompts
from sjd_vllm.models.demo.vq import DemoVQ
from sjd_vllm.models.family import ImageFamily, ImageSize, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar


class DemoFamily(ImageFamily):
    """The shipped model; every figure it needs stands in the checkpoint's config.json under "sjd"."""

    name = "demo"

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        sjd = config["sjd"]
        self.path = path
        height, width = sjd["image_size"]
        self.sizes = (ImageSize(width, height),)
        self.defaults = SamplingDefaults(**sjd["defaults"])
        self.examples = tuple(sjd.get("examples", ()))
        rows, columns = sjd["grid"]
        self._grammar = grid_grammar(
            first_code_id=sjd["image_token_start"],
            num_codes=sjd["num_image_tokens"],
            rows=rows,
            columns=columns,
            eol_token_id=sjd["eol_token_id"],
            eoi_token_id=sjd["eoi_token_id"],
        )

    @cached_property
    def _prompts(self) -> DemoPrompts:
        return DemoPrompts(self.path)

    @cached_property
    def _vq(self) -> DemoVQ:
        return DemoVQ.from_pretrained(self.path / "vq")

    def grammar(self, size: ImageSize) -> ImageGrammar:
        return self._grammar

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return self._prompts.conditional(prompt)

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        return self._prompts.conditional(negative_prompt) if negative_prompt else self._prompts.unconditional()

    @torch.inference_mode()
    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> np.ndarray[Any, np.dtype[np.uint8]]:
        codes = torch.stack([self._grammar.codes(ids) for ids in token_ids])
        pixels = self._vq.decode(codes)
        array: np.ndarray[Any, np.dtype[np.uint8]] = (
            ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        )
        return array


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return DemoFamily(path, config)
