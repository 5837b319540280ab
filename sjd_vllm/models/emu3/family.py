"""Emu3-Gen: about 720 x 720 pixels at any of several ratios, 8 x 8 pixels a code.

A row of codes ends with the end-of-line token, the last one too; end of frame, end of image and end of text close the
picture (baaivision/Emu3, emu3/mllm/utils_emu3.py, `Emu3PrefixConstrainedLogitsHelper`).

A checkpoint is a folder in one of two layouts:

* BAAI's release (BAAI/Emu3-Gen), whose pixels are another download: BAAI/Emu3-VisionTokenizer is looked for in the
  subfolder `vision_tokenizer`;
* the Hugging Face conversion (BAAI/Emu3-Gen-hf), which holds both.

No code of the release is run: configs and tokenizer are read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.config_format import register_config_format
from sjd_vllm.models.emu3.config import (
    ARCHITECTURE,
    CONFIG_FORMAT,
    TOKENIZER_FOLDER,
    emu3_shape,
    is_emu3,
    served_config,
)
from sjd_vllm.models.emu3.names import published_text
from sjd_vllm.models.family import DecoderShape, ImageFamily, ImageSize, Pixels, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.llama_weights import llama_shapes
from sjd_vllm.models.pixel_device import decode_on, encode_on
from sjd_vllm.models.tensors import tensor_shapes

if TYPE_CHECKING:
    from sjd_vllm.models.emu3.prompts import Emu3Prompts
    from sjd_vllm.models.emu3.vq import Emu3VQ

ARCHITECTURES = {ARCHITECTURE: "sjd_vllm.models.emu3.model:Emu3ForImageGeneration"}

RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))  # width to height; the authors take any
_SMALLER_AREA = 512 * 512  # the resolution of pre-training (arXiv 2409.18869); the config's own area comes first
_PROMPT_ROOM = 128  # positions kept for the prompt; the authors' negative prompt takes about 60


class Emu3Family(ImageFamily):
    """Sizes are areas times ratios, rounded to whole codes as the authors do.

    Defaults: guidance 3, top-k 2048, temperature 1 (baaivision/Emu3, image_generation.py, `classifier_free_guidance`
    and `GENERATION_CONFIG`).
    """

    name = "emu3"
    can_encode = True
    defaults = SamplingDefaults(temperature=1.0, top_k=2048, top_p=1.0, guidance_scale=3.0)
    examples = ("a red fox in fresh snow, morning light.", "an old lighthouse above a stormy sea.")

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self._shape = emu3_shape(path, config)
        self.shape = DecoderShape.from_config(self._shape.text)
        self._grids = dict(self._possible_grids())
        if not self._grids:
            raise ValueError(
                f"the config of an Emu3 checkpoint has image_area {self._shape.image_area}, "
                f"of which no picture fits into {self.shape.max_positions} positions"
            )
        self.sizes = tuple(self._grids)
        self._grammars: dict[ImageSize, ImageGrammar] = {}

    def _possible_grids(self) -> Iterator[tuple[ImageSize, tuple[int, int]]]:
        side = self._shape.pixels_per_code
        room = self.shape.max_positions - min(_PROMPT_ROOM, self.shape.max_positions // 2)
        for area in dict.fromkeys((self._shape.image_area, min(_SMALLER_AREA, self._shape.image_area))):
            for ratio in RATIOS:
                rows, columns = picture_grid(ratio, area, side)
                if rows and columns and rows * (columns + 1) + len(self._shape.end_of_picture) <= room:
                    yield ImageSize(columns * side, rows * side), (rows, columns)

    @property
    def engine_args(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The format of the config, and no tokenizer of vLLM's own where that would be code of the release."""
        out: dict[str, Any] = {"config_format": register_config_format(CONFIG_FORMAT, served_config)}
        if self._shape.is_original:
            out["skip_tokenizer_init"] = True
        return out

    @cached_property
    def _prompts(self) -> Emu3Prompts:
        from sjd_vllm.models.emu3.prompts import Emu3Prompts

        return Emu3Prompts(self.path, is_original=self._shape.is_original)

    @cached_property
    def _vq(self) -> Emu3VQ:
        from sjd_vllm.models.emu3.vq import Emu3VQ

        return Emu3VQ(self._shape, self._vq_files())

    def _vq_files(self) -> list[Path]:
        """The files with the vision tokenizer. Raises ValueError that says where it is looked for."""
        folder = self.path / TOKENIZER_FOLDER if self._shape.is_original else self.path
        files = weight_files(folder)
        if not files:
            raise ValueError(
                f"there is no vision tokenizer: {folder} must hold a download of BAAI/Emu3-VisionTokenizer"
            )
        return files

    def grammar(self, size: ImageSize) -> ImageGrammar:
        if size not in self._grammars:
            rows, columns = self._grids[size]
            self._grammars[size] = grid_grammar(
                code_ids=self._shape.code_ids,
                rows=rows,
                columns=columns,
                end_of_row=[self._shape.end_of_line],
                end_of_image=self._shape.end_of_picture,
            )
        return self._grammars[size]

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return self._prompts.conditional(prompt, *self._grids[size])

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        return self._prompts.unconditional(negative_prompt, *self._grids[size])

    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        grammar = self.grammar(size)
        codes = torch.stack([grammar.codes(ids) for ids in token_ids])
        pixels = decode_on(self.pixel_device, self._vq, codes)
        # image_processing_emu3visionvq.py, `postprocess`: clipped, and the fraction cut off
        array: Pixels = ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    def encode_pixels(self, pixels: Pixels, size: ImageSize) -> Tensor:
        scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        return encode_on(self.pixel_device, self._vq, scaled)[0]

    def problems(self) -> list[str]:
        from sjd_vllm.models.emu3.vq import vq_names, vq_problems

        files = weight_files(self.path)
        if not files:
            return ["there are no weights (*.safetensors or *.bin)"]
        out: list[str] = []
        try:
            found = tensor_shapes(files)
            in_vq = set() if self._shape.is_original else vq_names(self._shape, found)
            text = {name: shape for name, shape in found.items() if name not in in_vq}
            expected = published_text(llama_shapes(self._shape.text), found)
            out += rule_of(self._shape.text).differences(expected, text)
            vq_files = self._vq_files()
            out += vq_problems(self._shape, vq_files)
            if self._shape.is_original:
                vq_found = tensor_shapes(vq_files)
                known = vq_names(self._shape, vq_found)
                out += [f"{TOKENIZER_FOLDER}: the tensor {name} is not known" for name in vq_found if name not in known]
        except ValueError as error:
            out.append(str(error))
        return out + self._tokenizer_problems()

    def _tokenizer_problems(self) -> list[str]:
        """The tokenizer must give the ids that the config gives."""
        expected = {"<|extra_200|>": self._shape.end_of_line, "<|image end|>": self._shape.end_of_picture[1]}
        codes = self._shape.code_ids
        expected |= {f"<|visual token {code:06d}|>": codes[code] for code in (0, len(codes) - 1)}
        try:
            ids = {token: self._prompts.id_of(token) for token in expected}
        except Exception as error:  # the tokenizers' own exceptions for damaged files
            return [f"the tokenizer cannot be used: {error}"]
        return [
            f"the token {token} has the id {ids[token]} in the tokenizer and {index} by the config"
            for token, index in expected.items()
            if ids[token] != index
        ]


def picture_grid(ratio: tuple[int, int], area: int, side: int) -> tuple[int, int]:
    """Rows and columns of a picture of some ratio (width, height) and area in pixels, with `side` pixels a code.

    Source: emu3/mllm/processing_emu3.py, `calculate_generate_size`.
    """
    width, height = ratio
    scale = (area / (width * height)) ** 0.5
    return round(height * scale / side), round(width * scale / side)


def matches(path: Path, config: dict[str, Any]) -> bool:
    """By the config's model_type."""
    return is_emu3(config)


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return Emu3Family(path, config)
