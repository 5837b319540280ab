"""Chameleon and Anole: 512 x 512 pixels in 32 x 32 codes, no other tokens between or behind them.

Checkpoints: GAIR/Anole-7b-v0.1 (Meta's layout), leloy/Anole-7b-v0.1-hf (the Hugging Face conversion, with the pixel
decoder), and any other Chameleon in either layout. Meta's own facebook/chameleon-7b and -30b load too, but were
released without the ability to write pictures. `config`: layouts; `vq`: where the pixel decoder is looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.chameleon.config import (
    ARCHITECTURE,
    CONFIG_FORMAT,
    is_chameleon,
    read_config,
    served_config,
    vocabulary,
)
from sjd_vllm.models.chameleon.prompts import BEGIN_IMAGE, ChameleonPrompts, code_ids, token_id
from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.config_format import register_config_format
from sjd_vllm.models.family import DecoderShape, ImageFamily, ImageSize, Pixels, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.pixel_device import decode_on, encode_on
from sjd_vllm.models.tensors import tensor_shapes

if TYPE_CHECKING:
    from sjd_vllm.models.chameleon.vq import ChameleonVQ

MODEL_CLASS = "sjd_vllm.models.chameleon.model:ChameleonForImageGeneration"
ARCHITECTURES = {ARCHITECTURE: MODEL_CLASS}


class ChameleonFamily(ImageFamily):
    """One size.

    Defaults: temperature 0.7, top-p 0.9, guidance 3 (GAIR-NLP/anole, chameleon/inference/chameleon.py, `Options.Image`;
    its second guidance, between the pictures of a prompt, has nothing to work on in a prompt of text alone).
    """

    name = "chameleon"
    can_encode = True
    defaults = SamplingDefaults(temperature=0.7, top_k=0, top_p=0.9, guidance_scale=3.0)
    examples = ("draw a dog", "A red fox in the snow", "A bowl of fruit on a wooden table")

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        from sjd_vllm.models.chameleon.vq import vq_shape

        self.path = path
        self._config = read_config(path, config)
        self.shape = DecoderShape.from_config(self._config.to_dict())
        self._vq_shape = vq_shape(path, self._config)
        self._vocabulary = vocabulary(path, self._config)
        self._code_ids = code_ids(self._vocabulary)
        self._begin_image = token_id(self._vocabulary, BEGIN_IMAGE)
        if len(self._code_ids) != self._vq_shape.num_codes:
            raise ValueError(
                f"the vocabulary names {len(self._code_ids)} image tokens; the codebook has {self._vq_shape.num_codes}"
            )
        if max(*self._code_ids, self._begin_image) >= self.shape.vocab_size:
            raise ValueError(f"the vocabulary has image tokens beyond the model's {self.shape.vocab_size} ids")
        self.sizes = self._sizes(config)
        self._grammars: dict[ImageSize, ImageGrammar] = {}

    def _sizes(self, config: dict[str, Any]) -> tuple[ImageSize, ...]:
        return (ImageSize(self._vq_shape.resolution, self._vq_shape.resolution),)

    @property
    def engine_args(self) -> Mapping[str, Any]:  # type: ignore[override]
        """For Meta's layout, whose config and tokenizer are not where vLLM looks for them.

        Asking for them makes the format of the config known to vLLM in this process.
        """
        if not hasattr(self._config, "original_weights"):
            return {}
        return {"config_format": register_config_format(CONFIG_FORMAT, served_config), "skip_tokenizer_init": True}

    @cached_property
    def _prompts(self) -> ChameleonPrompts:
        return ChameleonPrompts(self.path, self._vocabulary)

    @cached_property
    def _vq(self) -> ChameleonVQ:
        from sjd_vllm.models.chameleon.vq import ChameleonVQ

        return ChameleonVQ.from_checkpoint(self.path, self._vq_shape)

    def grammar(self, size: ImageSize) -> ImageGrammar:
        if size not in self._grammars:
            self._grammars[size] = self._make_grammar(size)
        return self._grammars[size]

    def _make_grammar(self, size: ImageSize) -> ImageGrammar:
        side = self._vq_shape.pixels_per_code
        return grid_grammar(code_ids=self._code_ids, rows=size.height // side, columns=size.width // side)

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return self._prompts.conditional(prompt)

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        """A prompt like any other; for None, one without words."""
        return self._prompts.conditional(negative_prompt) if negative_prompt else self._prompts.unconditional()

    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        grammar = self.grammar(size)
        codes = torch.stack([grammar.codes(ids) for ids in token_ids])
        pixels = decode_on(self.pixel_device, self._vq, codes)
        # the authors clip and cut the fraction off (chameleon/inference/image_tokenizer.py, _pil_from_chw_tensor)
        array: Pixels = ((pixels.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    def encode_pixels(self, pixels: Pixels, size: ImageSize) -> Tensor:
        scaled = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255 * 2 - 1
        return encode_on(self.pixel_device, self._vq, scaled)[0]

    def problems(self) -> list[str]:
        from sjd_vllm.models.chameleon.vq import vq_problems
        from sjd_vllm.models.chameleon.weights import decoder_problems, decoder_shapes, original_problems

        original = getattr(self._config, "original_weights", None)
        if original is not None:
            out = [*original_problems(self._config, Path(original)), *vq_problems(self.path, self._vq_shape)]
        else:
            files = weight_files(self.path)
            if not files:
                return ["there are no weights (*.safetensors or *.bin)"]
            try:
                found = tensor_shapes(files)
            except ValueError as error:
                return [str(error)]
            out = decoder_problems(decoder_shapes(self._config), found, rule_of(self._config.to_dict()))
            out += vq_problems(self.path, self._vq_shape, found)
        try:
            self._prompts.conditional("")
        except Exception as error:  # the tokenizers package raises what it likes
            out.append(f"the tokenizer cannot be used: {error}")
        return out


def matches(path: Path, config: dict[str, Any]) -> bool:
    """By the config's model_type, or by the folders of Meta's layout."""
    return is_chameleon(path, config)


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return ChameleonFamily(path, config)
