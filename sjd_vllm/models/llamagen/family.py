"""LlamaGen: pictures of a class or of a caption, square, in rows of codes with no other tokens between or behind them.

`layout` says which files a folder holds. A class-conditional prompt is a number from 0 to 999 or a name of ImageNet's
classes; a caption is read by the T5 in the folder, and its projected features are the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sjd_vllm.config import ConfigError
from sjd_vllm.models.config_format import register_config_format
from sjd_vllm.models.family import DecoderShape, ImageFamily, ImageSize, Pixels, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.llamagen.layout import (
    ARCHITECTURE,
    CONFIG_FORMAT,
    UNUSED,
    is_llamagen,
    llamagen_shape,
    served_config,
    transformer_file,
    vq_file,
)
from sjd_vllm.models.pixel_device import decode_on, encode_on
from sjd_vllm.models.tensors import differences, tensor_shapes

if TYPE_CHECKING:
    from sjd_vllm.models.llamagen.prompts import CaptionPrompts, ClassPrompts
    from sjd_vllm.models.llamagen.vq import LlamaGenVQ

ARCHITECTURES = {ARCHITECTURE: "sjd_vllm.models.llamagen.model:LlamaGenForImageGeneration"}

# FoundationVision/LlamaGen, the defaults of autoregressive/sample/sample_c2i.py and sample_t2i.py
_DEFAULTS = {
    "c2i": SamplingDefaults(temperature=1.0, top_k=2000, top_p=1.0, guidance_scale=4.0),
    "t2i": SamplingDefaults(temperature=1.0, top_k=1000, top_p=1.0, guidance_scale=7.5),
}
# of the same scripts
_EXAMPLES = {
    "c2i": ("golden retriever", "geyser", "valley", "balloon", "otter", "arctic fox"),
    "t2i": (
        "A blue Porsche 356 parked in front of a yellow brick wall.",
        "A photo of an astronaut riding a horse in the forest. There is a river in front of them with water lilies.",
        "A map of the United States made out of sushi. It is on a table next to a glass of red wine.",
    ),
}


class LlamaGenFamily(ImageFamily):
    """One size, the one that the checkpoint was trained at."""

    name = "llamagen"
    can_encode = True

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self._shape = shape = llamagen_shape(path, config)
        self.sizes = (ImageSize(shape.image_size, shape.image_size),)
        self.defaults = _DEFAULTS[shape.kind]
        has_names = shape.is_text or shape.num_labels == 1001
        self.examples = _EXAMPLES[shape.kind] if has_names else ()
        self.embedded_token_id = shape.caption_id
        self.shape = DecoderShape(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.served_head_dim,
            max_positions=shape.max_positions,
            vocab_size=shape.vocab_size,
        )
        self._grammar = grid_grammar(code_ids=range(shape.num_codes), rows=shape.grid, columns=shape.grid)

    @property
    def engine_args(self) -> Mapping[str, Any]:  # type: ignore[override]
        """How vLLM reads the folder; asking for it makes the format known to vLLM in this process."""
        return {
            "config_format": register_config_format(CONFIG_FORMAT, served_config),
            "load_format": "safetensors" if transformer_file(self.path).suffix == ".safetensors" else "pt",
            "skip_tokenizer_init": True,  # the ids that vLLM sees are no text's
            "enable_prompt_embeds": self._shape.is_text,
        }

    @cached_property
    def _classes(self) -> ClassPrompts:
        from sjd_vllm.models.llamagen.prompts import ClassPrompts

        return ClassPrompts(self._shape)

    @cached_property
    def _captions(self) -> CaptionPrompts:
        from sjd_vllm.models.llamagen.prompts import CaptionPrompts

        return CaptionPrompts(self.path, self._shape)

    @cached_property
    def _vq(self) -> LlamaGenVQ:
        from sjd_vllm.models.llamagen.vq import LlamaGenVQ

        return LlamaGenVQ.from_file(vq_file(self.path))

    def grammar(self, size: ImageSize) -> ImageGrammar:
        return self._grammar

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return (self._captions if self._shape.is_text else self._classes).conditional(prompt)

    def prompt_embeds(self, prompt: str, size: ImageSize) -> Tensor | None:
        return self._captions.vectors(prompt, self.pixel_device) if self._shape.is_text else None

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        """Of text, all rows of the learned caption. Raises ConfigError for any other: guidance leads away from that."""
        if not self._shape.is_text:
            return self._classes.conditional(negative_prompt) if negative_prompt else self._classes.unconditional()
        if negative_prompt:
            raise ConfigError(
                "negative_prompt",
                "this model leads away from the caption that it learned for none, and from no other; leave "
                "negative_prompt out.",
            )
        return self._captions.unconditional(self._shape.num_caption_rows)

    def unconditional_token_ids(self, prompt_token_ids: list[int], size: ImageSize) -> list[int]:
        if not self._shape.is_text:
            return self._classes.unconditional()
        return self._captions.unconditional(len(prompt_token_ids))

    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        codes = torch.stack([self._grammar.codes(ids) for ids in token_ids])
        pixels = decode_on(self.pixel_device, self._vq, codes)
        # as torchvision's save_image does, which the authors call: 255 x + 0.5, the fraction cut off
        array: Pixels = ((pixels.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    def encode_pixels(self, pixels: Pixels, size: ImageSize) -> Tensor:
        scaled = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        return encode_on(self.pixel_device, self._vq, scaled)[0]

    def weight_files(self) -> list[Path]:
        from sjd_vllm.models.llamagen.layout import TEXT_ENCODER

        encoder = sorted((self.path / TEXT_ENCODER).glob("*.safetensors")) if self._shape.is_text else []
        return [transformer_file(self.path), vq_file(self.path), *encoder]

    def problems(self) -> list[str]:
        from sjd_vllm.models.llamagen.vq import vq_problems

        transformer, pixels = transformer_file(self.path), vq_file(self.path)
        out = [
            f"{transformer.name}: {problem}"
            for problem in differences(self._shape.tensors, tensor_shapes([transformer]), surplus=UNUSED)
        ]
        vq_shapes = tensor_shapes([pixels])
        out += [f"{pixels.name}: {problem}" for problem in vq_problems(vq_shapes)]
        num_codes = vq_shapes.get("quantize.embedding.weight", (self._shape.num_codes,))[0]
        if num_codes != self._shape.num_codes:
            out.append(f"{pixels.name} has {num_codes} codes, and {transformer.name} writes {self._shape.num_codes}")
        return out + (self._captions.problems() if self._shape.is_text else [])


def matches(path: Path, config: dict[str, Any]) -> bool:
    """By the names of the release's files, or the fields of the authors' config."""
    return is_llamagen(path, config)


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return LlamaGenFamily(path, config)
