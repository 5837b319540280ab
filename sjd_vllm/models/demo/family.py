"""The demo family: a small Llama that writes 16 x 16 VQ codes, each row ended by <eol>, the picture by <eoi>."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.demo.prompts import DemoPrompts
from sjd_vllm.models.demo.vq import DemoVQ
from sjd_vllm.models.family import DecoderShape, ImageFamily, ImageSize, Pixels, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.llama_weights import llama_shapes
from sjd_vllm.models.pixel_device import decode_on, encode_on
from sjd_vllm.models.tensors import tensor_shapes


class DemoFamily(ImageFamily):
    """The shipped model; every figure it needs stands in the checkpoint's config.json under "sjd"."""

    name = "demo"
    can_encode = True

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        sjd = config["sjd"]
        self.path = path
        self._config = config
        height, width = sjd["image_size"]
        rows, columns = sjd["grid"]
        # A picture is written from the top, so its upper rows alone are a wide picture of the same law.
        num_rows = [rows, *sjd.get("fewer_rows", [])]
        self.sizes = tuple(ImageSize(width, height // rows * number) for number in num_rows)
        self.defaults = SamplingDefaults(**sjd["defaults"])
        self.shape = DecoderShape.from_config(config)
        self.examples = tuple(sjd.get("examples", ()))
        self._grammars = {
            size: grid_grammar(
                code_ids=range(sjd["image_token_start"], sjd["image_token_start"] + sjd["num_image_tokens"]),
                rows=number,
                columns=columns,
                end_of_row=[sjd["eol_token_id"]],
                end_of_image=[sjd["eoi_token_id"]],
            )
            for size, number in zip(self.sizes, num_rows, strict=True)
        }

    @cached_property
    def _prompts(self) -> DemoPrompts:
        return DemoPrompts(self.path)

    @cached_property
    def _vq(self) -> DemoVQ:
        return DemoVQ.from_pretrained(self.path / "vq")

    def grammar(self, size: ImageSize) -> ImageGrammar:
        return self._grammars[size]

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return self._prompts.conditional(prompt)

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        return self._prompts.conditional(negative_prompt) if negative_prompt else self._prompts.unconditional()

    @torch.inference_mode()
    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        codes = [self._grammars[size].codes(ids)[None] for ids in token_ids]
        # One after the other: convolutions of one and of several may round differently, and a file must not depend on
        # which other pictures are finished with it.
        pixels = torch.cat([decode_on(self.pixel_device, self._vq, one) for one in codes])
        array: Pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    @torch.inference_mode()
    def encode_pixels(self, pixels: Pixels, size: ImageSize) -> Tensor:
        scaled = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        return encode_on(self.pixel_device, self._vq, scaled)[0]

    def problems(self) -> list[str]:
        """Also of a decoder whose tensors the engine, which is vLLM's own Llama, would not account for one by one."""
        if missing := super().problems():
            return missing
        try:
            return rule_of(self._config).differences(llama_shapes(self._config), tensor_shapes(weight_files(self.path)))
        except ValueError as error:
            return [str(error)]


ARCHITECTURES: dict[str, str] = {}  # vLLM's own Llama


def matches(path: Path, config: dict[str, Any]) -> bool:
    """Never: a demo checkpoint names its family."""
    return False


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return DemoFamily(path, config)
