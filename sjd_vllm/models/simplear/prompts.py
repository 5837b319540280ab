"""Prompt template of SimpleAR, and its unconditional prompt, which describes a bad picture.

Source: wdrink/SimpleAR, generate.py, `generate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

_POSITIVE = "A highly realistic image of "
_NEGATIVE = "An image of "
_BAD = (
    "aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad eyes, "
    "bad limbs, distortion"
)


class SimpleARPrompts:
    """Prompts to token ids.

    Args:
        checkpoint: its folder.
        num_text_ids: ids below the first code; the authors count codes from `len(tokenizer)`.

    Raises ValueError for a tokenizer of another size, under which codes would be counted wrongly.
    """

    def __init__(self, checkpoint: Path, num_text_ids: int) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        if len(self._tokenizer) != num_text_ids:
            raise ValueError(
                f"the tokenizer has {len(self._tokenizer)} tokens; the vocabulary without codes has {num_text_ids}"
            )

    def conditional(self, prompt: str) -> list[int]:
        """``<|t2i|>A highly realistic image of PROMPT<|soi|>``."""
        return self._ids(_POSITIVE + prompt)

    def unconditional(self, negative_prompt: str | None) -> list[int]:
        """``<|t2i|>An image of ...<|soi|>``, of what guidance leads away from."""
        return self._ids(_NEGATIVE + (negative_prompt or _BAD))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(f"<|t2i|>{text}<|soi|>").input_ids
        return ids
