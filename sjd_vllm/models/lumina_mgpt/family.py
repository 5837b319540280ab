"""Lumina-mGPT, the first: pictures of many sizes, each row of codes ended by a token, the picture by another.

Checkpoints: Alpha-VLLM/Lumina-mGPT-7B-512, -7B-768, -7B-768-Omni, -7B-1024, -34B-512. They hold the decoder alone; the
pixel decoder is Meta's, and `sjd_vllm.models.chameleon.vq` says where in the folder it is looked for. The model class
and the pixels are Chameleon's.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from sjd_vllm.models.chameleon.family import MODEL_CLASS, ChameleonFamily
from sjd_vllm.models.chameleon.prompts import END_IMAGE, token_id
from sjd_vllm.models.family import ImageFamily, ImageSize, SamplingDefaults
from sjd_vllm.models.grammar import ImageGrammar, grid_grammar
from sjd_vllm.models.lumina_mgpt.prompts import CODES_PER_UNIT, NEW_LINE, LuminaPrompts, size_token

_ARCHITECTURE = "ChameleonXLLMXForConditionalGeneration"  # lumina_mgpt/model/modeling_xllmx_chameleon.py
ARCHITECTURES = {_ARCHITECTURE: MODEL_CLASS}

_NAME = re.compile(r"lumina-?_?mgpt", re.IGNORECASE)
_NAME_OF_SECOND = re.compile(r"lumina-?_?mgpt-?_?2", re.IGNORECASE)
_TARGET_IN_NAME = re.compile(r"mgpt-\d+b-(\d+)", re.IGNORECASE)
_TARGETS = (512, 768, 1024)
_MAX_RATIO = 4


class LuminaMGPTFamily(ChameleonFamily):
    """Sizes of about one area, the square of the checkpoint's target size; the square itself is the default.

    The target size is `target_size` of "sjd" in the config, or the number in the name ("Lumina-mGPT-7B-768") of the
    folder, of one above it or of the config's _name_or_path, or else the largest of 512, 768, 1024 that the positions
    have room for.

    Defaults: temperature 1 (README.md of Alpha-VLLM/Lumina-mGPT), guidance 3 and top-k 2000 (lumina_mgpt/
    inference_solver.py, `create_logits_processor`; the README's examples say guidance 4).
    """

    name = "lumina_mgpt"
    defaults = SamplingDefaults(temperature=1.0, top_k=2000, top_p=1.0, guidance_scale=3.0)
    examples = (
        "Image of a dog playing water, and a waterfall is in the background.",
        "Image of a quiet European village with cobblestone streets and colorful houses, under a clear blue sky.",
        "Image of a bustling downtown street in Tokyo at night, with neon signs, crowded sidewalks, and tall "
        "skyscrapers.",
    )

    def _sizes(self, config: dict[str, Any]) -> tuple[ImageSize, ...]:
        unit = self._vq_shape.pixels_per_code * CODES_PER_UNIT
        target = self._target_size(config)
        if target < unit or target % unit:
            raise ValueError(f"the target size must be a multiple of {unit} pixels; got {target}")
        square = ImageSize(target, target)
        shapes = crop_sizes((target // unit) ** 2)
        sizes = [square, *(size for w, h in shapes if (size := ImageSize(w * unit, h * unit)) != square)]
        fitting = tuple(size for size in sizes if self._num_tokens(size) < self.shape.max_positions)
        if square not in fitting:
            raise ValueError(
                f"a picture of {square} has {self._num_tokens(square)} tokens; max_position_embeddings of the config "
                f"leaves {self.shape.max_positions} for picture and prompt"
            )
        self._new_line, self._end_image = (token_id(self._vocabulary, token) for token in (NEW_LINE, END_IMAGE))
        token_id(self._vocabulary, size_token(max(max(size.width, size.height) for size in fitting) // unit))
        return fitting

    def _target_size(self, config: dict[str, Any]) -> int:
        given = (config.get("sjd") or {}).get("target_size")
        if given is not None:
            if not isinstance(given, int) or isinstance(given, bool):
                raise ValueError(f"target_size must be a whole number of pixels; got {given!r}")
            return given
        for name in (*reversed(self.path.absolute().parts), str(config.get("_name_or_path", ""))):
            found = _TARGET_IN_NAME.search(name)
            if found:
                return int(found[1])
        room = [side for side in _TARGETS if self._num_tokens(ImageSize(side, side)) < self.shape.max_positions]
        return max(room, default=_TARGETS[0])

    def _num_tokens(self, size: ImageSize) -> int:
        """Of a picture: its codes, an end of each row, an end of all."""
        side = self._vq_shape.pixels_per_code
        return (size.height // side) * (size.width // side + 1) + 1

    @cached_property
    def _lumina_prompts(self) -> LuminaPrompts:
        return LuminaPrompts(self.path, self._vocabulary)

    def _make_grammar(self, size: ImageSize) -> ImageGrammar:
        rows, columns = self._grid(size)
        return grid_grammar(
            code_ids=self._code_ids,
            rows=rows,
            columns=columns,
            end_of_row=[self._new_line],
            end_of_image=[self._end_image],
        )

    def _grid(self, size: ImageSize) -> tuple[int, int]:
        side = self._vq_shape.pixels_per_code
        return size.height // side, size.width // side

    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        return self._lumina_prompts.conditional(prompt, str(size), *self._grid(size))

    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        """A prompt like any other; for None, the picture's beginning alone."""
        if negative_prompt:
            return self.prompt_token_ids(negative_prompt, size)
        return self._lumina_prompts.beginning(*self._grid(size))


def crop_sizes(num_units: int) -> list[tuple[int, int]]:
    """(width, height) in units, wide ones first: what item_processor.py's `generate_crop_size_list` gives.

    For each width, the heights between the most that still fit one unit more of width and the most that fit.
    """
    return [
        (width, height)
        for width in range(num_units, 0, -1)
        for height in range(max(1, num_units // (width + 1)), num_units // width + 1)
        if max(width, height) <= _MAX_RATIO * min(width, height)
    ]


def matches(path: Path, config: dict[str, Any]) -> bool:
    """A Chameleon whose config has the class or the fields that Lumina-mGPT's training saved, or whose name says so."""
    if config.get("model_type") != "chameleon":
        return False
    names = " ".join((*path.absolute().parts[-3:], str(config.get("_name_or_path", ""))))
    is_saved_by_it = _ARCHITECTURE in (config.get("architectures") or ()) or "z_loss_weight" in config
    return (is_saved_by_it or _NAME.search(names) is not None) and _NAME_OF_SECOND.search(names) is None


def load(path: Path, config: dict[str, Any]) -> ImageFamily:
    """Entry point of `load_family`."""
    return LuminaMGPTFamily(path, config)
