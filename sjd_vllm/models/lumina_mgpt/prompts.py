"""Prompts of Lumina-mGPT: the template with the picture's size, and size tokens behind the begin-of-image token.

Sources, all in Alpha-VLLM/Lumina-mGPT: lumina_mgpt/generate_examples/generate.py (the template);
lumina_mgpt/data/convertsation.py (the separator behind the question); lumina_mgpt/data/item_processor.py
(`FlexARItemProcessor`: tokens for sizes and ends of lines, a unit of size being two codes, heights first);
lumina_mgpt/inference_solver.py (`get_unconditional_logits`: guidance starts behind the size tokens, and its context is
what begins with the begin-of-image token, so the unconditional prompt has no <s> before it).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sjd_vllm.models.chameleon.prompts import BEGIN_IMAGE, ChameleonPrompts, token_id

NEW_LINE = "<reserved08799>"
CODES_PER_UNIT = 2  # the authors' patch_size of 32 pixels, at 16 pixels per code
_SIZE_ZERO = 8800


def size_token(units: int) -> str:
    """The token of a width or height of so many units."""
    return f"<reserved{_SIZE_ZERO + units:05d}>"


class LuminaPrompts:
    """Prompts to token ids."""

    def __init__(self, checkpoint: Path, vocabulary: Mapping[str, int]) -> None:
        self._prompts = ChameleonPrompts(checkpoint, vocabulary)
        self._vocabulary = vocabulary

    def conditional(self, prompt: str, size: str, rows: int, columns: int) -> list[int]:
        """``<s> Generate an image of WxH according to the following prompt:\\n... <sep>`` and what `beginning` says."""
        text = f"Generate an image of {size} according to the following prompt:\n{prompt}"
        return [*self._prompts.turn(text), *self.beginning(rows, columns)]

    def beginning(self, rows: int, columns: int) -> list[int]:
        """``<begin of image> height width``, which is the unconditional prompt as well."""
        tokens = (BEGIN_IMAGE, size_token(rows // CODES_PER_UNIT), size_token(columns // CODES_PER_UNIT))
        return [token_id(self._vocabulary, token) for token in tokens]
