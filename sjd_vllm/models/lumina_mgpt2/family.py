"""Lumina-mGPT 2.0: about 768 x 768 pixels at any of many ratios, 8 x 8 pixels a code, each row closed by a new line.

A checkpoint is a folder in the layout of Alpha-VLLM/Lumina-mGPT-2.0 (safetensors, a Chameleon config, tokenizer.json).
Its pixels are another download: movqgan_270M.ckpt of ai-forever/MoVQGAN is looked for in that folder as
movqgan/270M/movqgan_270M.ckpt, which is the authors' own place for it.
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
from sjd_vllm.models.config_format import register_config_format
from sjd_vllm.models.family import DecoderShape, ImageFamily, ImageSize, Pixels, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.lumina_mgpt2.config import (
    ARCHITECTURE,
    CONFIG_FORMAT,
    MOVQ_FILE,
    PATCH,
    decoder_shapes,
    is_lumina_mgpt2,
    lumina_shape,
    picture_sizes,
    served_config,
)
from sjd_vllm.models.pixel_device import decode_on, encode_on
from sjd_vllm.models.tensors import tensor_shapes

if TYPE_CHECKING:
    from sjd_vllm.models.lumina_mgpt2.prompts import LuminaPrompts
    from sjd_vllm.models.lumina_mgpt2.vq import MoVQ

ARCHITECTURES = {ARCHITECTURE: "sjd_vllm.models.lumina_mgpt2.model:LuminaMGPT2ForImageGeneration"}

_PROMPT_ROOM = 128  # positions kept for the prompt


class LuminaMGPT2Family(ImageFamily):
    """Sizes are the authors' list for 768 pixels, the square first.

    Defaults: guidance 4, top-k 4096, temperature 1 (README.md, "Simple Inference"). The authors' processor lowers the
    guidance along the picture, but never below 4 (inference_solver.py), so 4 stays 4.
    """

    name = "lumina_mgpt2"
    can_encode = True
    defaults = SamplingDefaults(temperature=1.0, top_k=4096, top_p=1.0, guidance_scale=4.0)
    examples = (
        "A red fox sits in fresh snow at the edge of a pine forest, lit by a low morning sun, soft background.",
        "An old lighthouse on a cliff above a stormy sea, oil painting with thick brush strokes and cold colours.",
    )

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self._shape = lumina_shape(path, config)
        self.shape = DecoderShape.from_config(self._shape.text)
        room = self.shape.max_positions - min(_PROMPT_ROOM, self.shape.max_positions // 2)
        sizes = [ImageSize(*size) for size in picture_sizes(self._shape.target_size, PATCH)]
        sizes = [size for size in sizes if self._num_tokens(size) <= room]
        if not sizes:
            raise ValueError(f"no picture fits into the {self.shape.max_positions} positions of this Lumina-mGPT 2.0")
        self.sizes = tuple(sorted(sizes, key=lambda size: size.width != size.height))
        self._grammars: dict[ImageSize, ImageGrammar] = {}

    def _grid(self, size: ImageSize) -> tuple[int, int]:
        side = self._shape.movq.pixels_per_code
        return size.height // side, size.width // side

    def _num_tokens(self, size: ImageSize) -> int:
        rows, columns = self._grid(size)
        return rows * (columns + 1) + 1

    @property
    def engine_args(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The format of the config; asking for it makes the format known to vLLM in this process."""
        return {"config_format": register_config_format(CONFIG_FORMAT, served_config)}

    @cached_property
    def _prompts(self) -> LuminaPrompts:
        from sjd_vllm.models.lumina_mgpt2.prompts import LuminaPrompts

        return LuminaPrompts(self.path)

    @cached_property
    def _vq(self) -> MoVQ:
        from sjd_vllm.models.lumina_mgpt2.vq import MoVQ

        return MoVQ.from_file(self._vq_file(), self._shape.movq)

    def _vq_file(self) -> Path:
        """Raises ValueError that says where the file is looked for."""
        file = self.path / MOVQ_FILE
        if not file.is_file():
            raise ValueError(f"there is no pixel decoder: {file} must be a download from ai-forever/MoVQGAN")
        return file

    def grammar(self, size: ImageSize) -> ImageGrammar:
        if size not in self._grammars:
            first = self._shape.image_token_start
            rows, columns = self._grid(size)
            self._grammars[size] = grid_grammar(
                code_ids=range(first, first + self._shape.movq.num_codes),
                rows=rows,
                columns=columns,
                end_of_row=[self._prompts.new_line],
                end_of_image=[self._prompts.end_of_image],
            )
        return self._grammars[size]

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return self._prompts.conditional(prompt, size.width, size.height)

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        """The begin and the size of the picture alone. The authors have no negative prompts; here one is like any."""
        if negative_prompt:
            return self._prompts.conditional(negative_prompt, size.width, size.height)
        return self._prompts.unconditional(size.width, size.height)

    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        grammar = self.grammar(size)
        codes = torch.stack([grammar.codes(ids) for ids in token_ids])
        pixels = decode_on(self.pixel_device, self._vq, codes)
        # inference_solver.py, `show_images`
        array: Pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    def encode_pixels(self, pixels: Pixels, size: ImageSize) -> Tensor:
        scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        return encode_on(self.pixel_device, self._vq, scaled)[0]

    def problems(self) -> list[str]:
        from sjd_vllm.models.lumina_mgpt2.vq import movq_problems

        files = weight_files(self.path)
        if not files:
            return ["there are no weights (*.safetensors or *.bin)"]
        out: list[str] = []
        expected = decoder_shapes(self._shape.text, self._shape.num_norm_groups)
        try:
            out += rule_of(self._shape.text).differences(expected, tensor_shapes(files), surplus=["model.vqmodel."])
            out += [f"{MOVQ_FILE}: {line}" for line in movq_problems(self._vq_file(), self._shape.movq)]
        except ValueError as error:
            out.append(str(error))
        try:
            for size in self.sizes:
                self._prompts.unconditional(size.width, size.height)
        except Exception as error:  # the tokenizer library's own exceptions for a damaged file
            out.append(f"the tokenizer cannot be used: {error}")
        return out


def matches(path: Path, config: dict[str, Any]) -> bool:
    """By the config's model_type and the size of its vocabulary."""
    return is_lumina_mgpt2(config)


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return LuminaMGPT2Family(path, config)
