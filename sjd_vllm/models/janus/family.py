"""Janus-Pro 1B and 7B and Janus-1.3B: 384 x 384 pixels in 24 x 24 codes, no other tokens between or behind them.

A checkpoint is a folder in one of two layouts: DeepSeek's release (deepseek-ai/Janus-Pro-7B, Janus-Pro-1B, Janus-1.3B;
pytorch_model*.bin or safetensors) or the Hugging Face conversion (deepseek-community/Janus-Pro-7B, -1B). Both hold the
pixel decoder among their weights. `config`: what ids stand for; `model`: which head scores a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.family import DecoderShape, ImageFamily, ImageSize, Pixels, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.janus.config import ARCHITECTURE, is_janus, janus_shape, register
from sjd_vllm.models.janus.names import is_known, language_tensors, unused_names, vq_tensors
from sjd_vllm.models.pixel_device import decode_on, encode_on
from sjd_vllm.models.tensors import tensor_shapes

if TYPE_CHECKING:
    from sjd_vllm.models.janus.prompts import JanusPrompts
    from sjd_vllm.models.janus.vq import JanusVQ

ARCHITECTURES = {ARCHITECTURE: "sjd_vllm.models.janus.model:JanusForImageGeneration"}


class JanusFamily(ImageFamily):
    """One size, and an unconditional prompt that is as long as the conditional one.

    Defaults: temperature 1, guidance 5, no top-k (deepseek-ai/Janus, generation_inference.py, `generate`).
    """

    name = "janus"
    can_encode = True
    defaults = SamplingDefaults(temperature=1.0, top_k=0, top_p=1.0, guidance_scale=5.0)
    examples = (
        "A close-up high-contrast photo of Sydney Opera House sitting next to Eiffel tower, under a blue night sky of "
        "roiling energy, exploding yellow stars, and radiating swirls of blue.",
        "A stunning princess from kabul in red, white traditional clothing, blue eyes, brown hair",
    )

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self._shape = janus_shape(path, config)
        self.sizes = (ImageSize(self._shape.image_size, self._shape.image_size),)
        self.shape = DecoderShape.from_config({**self._shape.text, "vocab_size": self._shape.vocab_size})
        self._roles = (config.get("sjd") or {}).get("roles")
        self._grammar = grid_grammar(
            code_ids=range(self._shape.text_vocab_size, self._shape.vocab_size),
            rows=self._shape.grid,
            columns=self._shape.grid,
        )

    @property
    def engine_args(self) -> Mapping[str, Any]:  # type: ignore[override]
        """How the folder is read; asking for it makes the format of the config known to vLLM in this process."""
        return {"config_format": register()}

    @cached_property
    def _prompts(self) -> JanusPrompts:
        from sjd_vllm.models.janus.prompts import JanusPrompts

        return JanusPrompts(self.path, self._roles)

    @cached_property
    def _vq(self) -> JanusVQ:
        from sjd_vllm.models.janus.vq import JanusVQ

        return JanusVQ(self._shape, self.path)

    def grammar(self, size: ImageSize) -> ImageGrammar:
        return self._grammar

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return self._prompts.conditional(prompt)

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        """A prompt like any other; for None, the padding that stands for one without words."""
        if negative_prompt:
            return self._prompts.conditional(negative_prompt)
        return self._prompts.unconditional(self._prompts.conditional(""))

    def unconditional_token_ids(self, prompt_token_ids: list[int], size: ImageSize) -> list[int]:
        return self._prompts.unconditional(prompt_token_ids)

    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        codes = torch.stack([self._grammar.codes(ids) for ids in token_ids])
        pixels = decode_on(self.pixel_device, self._vq, codes)
        # the authors clip and cut the fraction off: np.clip((dec + 1) / 2 * 255, 0, 255) into uint8
        array: Pixels = ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    def encode_pixels(self, pixels: Pixels, size: ImageSize) -> Tensor:
        scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        return encode_on(self.pixel_device, self._vq, scaled)[0]

    def problems(self) -> list[str]:
        from sjd_vllm.models.janus.vq import vq_shapes

        files = weight_files(self.path)
        if not files:
            return ["there are no weights (*.safetensors or *.bin)"]
        tensors = [*language_tensors(self._shape).values(), *vq_tensors(self._shape, vq_shapes(self._shape)).values()]
        try:
            shapes = tensor_shapes(files)
        except ValueError as error:
            return [str(error)]
        found = {name: shape for name, shape in shapes.items() if is_known(name)}
        expected, unused = {one.name: one.shape for one in tensors}, unused_names(self._shape)
        out = rule_of(self._shape.text).differences(expected, found, surplus=unused)
        try:
            self._prompts.unconditional(self._prompts.conditional(""))
        except Exception as error:
            out.append(f"the tokenizer cannot be used: {error}")
        return out


def matches(path: Path, config: dict[str, Any]) -> bool:
    """By the config's model_type and parts."""
    return is_janus(config)


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return JanusFamily(path, config)
