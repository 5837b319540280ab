"""SimpleAR 0.5B and 1.5B (Daniel0724/SimpleAR-0.5B-SFT, -RL, -1.5B-SFT, -RL): square pictures of 16 x 16 pixels a code.

The language model is a Qwen2 whose last 64000 ids are codes; vLLM's own class serves it. The pixel decoder is another
download, nvidia/Cosmos-1.0-Tokenizer-DV8x16x16: its decoder.jit is looked for in the folder
`Cosmos-1.0-Tokenizer-DV8x16x16` inside the checkpoint's, and read without running its code.

SimpleAR samples from the whole vocabulary and takes any other id for code 0; here codes alone are legal.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.family import DecoderShape, ImageFamily, ImageSize, Pixels, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.pixel_device import decode_on
from sjd_vllm.models.simplear.names import language_tensors, unused_names
from sjd_vllm.models.simplear.vq import PIXELS_PER_CODE, CosmosDecoder, CosmosShape
from sjd_vllm.models.tensors import tensor_shapes

if TYPE_CHECKING:
    from sjd_vllm.models.simplear.prompts import SimpleARPrompts

PIXEL_DECODER = "Cosmos-1.0-Tokenizer-DV8x16x16"
ARCHITECTURES = {"SimpARForCausalLM": "sjd_vllm.models.simplear.model:SimpARForCausalLM"}
_SIDES = (1024, 768, 512, 256)  # generate.py, --image-size


class SimpleARFamily(ImageFamily):
    """Sizes are told to the model by the number of codes alone.

    Defaults: temperature 1, guidance 6, and a top-k of all 64000 codes (wdrink/SimpleAR, generate.py). Its guidance
    mixes log-probabilities, which is the same distribution.
    """

    name = "simplear"
    defaults = SamplingDefaults(temperature=1.0, top_k=0, top_p=1.0, guidance_scale=6.0)
    examples = (
        "Inside a warm room with a large window showcasing a picturesque winter landscape, three gleaming ruby red "
        "necklaces are elegantly laid out on the plush surface of a deep purple velvet jewelry box.",
    )

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.shape = DecoderShape.from_config(config)
        self._config = config
        self._cosmos = _cosmos_shape(config)
        self._first_code = self.shape.vocab_size - self._cosmos.num_codes
        if self._first_code <= 0:
            raise ValueError(
                f"config.json says vocab_size {self.shape.vocab_size}: no room for {self._cosmos.num_codes} codes"
            )
        sides = [side for side in _SIDES if (side // PIXELS_PER_CODE) ** 2 < self.shape.max_positions]
        if not sides:
            raise ValueError(
                f"config.json says max_position_embeddings {self.shape.max_positions}: too few for a picture"
            )
        self.sizes = tuple(ImageSize(side, side) for side in sides)
        self._grammars: dict[ImageSize, ImageGrammar] = {}

    @cached_property
    def _prompts(self) -> SimpleARPrompts:
        from sjd_vllm.models.simplear.prompts import SimpleARPrompts

        return SimpleARPrompts(self.path, self._first_code)

    @cached_property
    def _decoder(self) -> CosmosDecoder:
        if not self._decoder_file.is_file():
            raise ValueError(self._missing_decoder())
        return CosmosDecoder.load(self._cosmos, self._decoder_file)

    @property
    def _decoder_file(self) -> Path:
        return self.path / PIXEL_DECODER / "decoder.jit"

    def _missing_decoder(self) -> str:
        return f"the pixel decoder {self._decoder_file} is missing: download nvidia/{PIXEL_DECODER} to that folder"

    def grammar(self, size: ImageSize) -> ImageGrammar:
        if size not in self._grammars:
            self._grammars[size] = grid_grammar(
                code_ids=range(self._first_code, self.shape.vocab_size),
                rows=size.height // PIXELS_PER_CODE,
                columns=size.width // PIXELS_PER_CODE,
            )
        return self._grammars[size]

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return self._prompts.conditional(prompt)

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        return self._prompts.unconditional(negative_prompt)

    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        grammar = self.grammar(size)
        codes = torch.stack([grammar.codes(ids) for ids in token_ids])
        pixels = decode_on(self.pixel_device, self._decoder, codes)
        array: Pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    def problems(self) -> list[str]:
        files = weight_files(self.path)
        out = [] if files else ["there are no weights (*.safetensors or *.bin)"]
        try:
            if files:
                expected, unused = language_tensors(self._config), unused_names(self._config)
                out += rule_of(self._config).differences(expected, tensor_shapes(files), surplus=unused)
            if not self._decoder_file.is_file():
                out.append(self._missing_decoder())
            else:
                with torch.device("meta"):
                    decoder = CosmosDecoder(self._cosmos)
                found = tensor_shapes([self._decoder_file])
                out += [f"{PIXEL_DECODER}: {problem}" for problem in decoder.problems(found)]
        except ValueError as error:
            out.append(str(error))
        try:
            self._prompts.unconditional(None)
        except Exception as error:
            out.append(f"the tokenizer cannot be used: {error}")
        return out


def _cosmos_shape(config: dict[str, Any]) -> CosmosShape:
    """The published decoder's, or what config.json says under "sjd", "pixel_decoder"."""
    given = (config.get("sjd") or {}).get("pixel_decoder") or {}
    sizes: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return CosmosShape(**sizes)
    except TypeError as error:
        raise ValueError(f"config.json says what no pixel decoder has: {error}") from error


def matches(path: Path, config: dict[str, Any]) -> bool:
    """By the architecture, or a Qwen2 whose tokenizer has SimpleAR's special tokens."""
    if "SimpARForCausalLM" in (config.get("architectures") or ()):
        return True
    return config.get("model_type") == "qwen2" and any(
        '"<|t2i|>"' in file.read_text(encoding="utf-8")
        for file in (path / "added_tokens.json", path / "tokenizer_config.json", path / "special_tokens_map.json")
        if file.is_file()
    )


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return SimpleARFamily(path, config)
