"""Prompt template of Lumina-mGPT 2.0, its unconditional prompt, and the ids of its special tokens.

Sources in Alpha-VLLM/Lumina-mGPT-2.0:

* lumina_mgpt/generate_examples/generate.py: the sentence, task "t2i";
* lumina_mgpt/data/convertsation.py: the separator behind it;
* xllmx/model/tokenizer.py (`Tokenizer.encode`): a first token, which is the tokenizer's bos or else its eos;
* lumina_mgpt/data/item_processor.py: the tokens of a picture, which are begin, rows and columns in units of 32 pixels,
  codes and new lines, end;
* lumina_mgpt/inference_solver.py (`get_unconditional_logits`): the unconditional prompt is begin, rows and columns.

The authors let the model write begin, rows and columns itself, after it was told the size; here they are given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sjd_vllm.models.lumina_mgpt2.config import PATCH

_BEGIN_OF_IMAGE, _END_OF_IMAGE, _NEW_LINE = "<racm3:break>", "<eoss>", "<reserved08799>"
_SEPARATOR = "<reserved08706>"


class LuminaPrompts:
    """Prompts to token ids, from tokenizer.json and tokenizer_config.json. Raises ValueError for what they lack."""

    def __init__(self, checkpoint: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (checkpoint / name).is_file():
                raise ValueError(f"the tokenizer of this Lumina-mGPT 2.0 checkpoint is missing: {checkpoint / name}")
        self._tokenizer: Any = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
        first = config.get("bos_token") or config.get("eos_token")
        self._first = self._id(first["content"] if isinstance(first, dict) else str(first))
        self._begin = self._id(_BEGIN_OF_IMAGE)
        self.end_of_image = self._id(_END_OF_IMAGE)
        self.new_line = self._id(_NEW_LINE)

    def conditional(self, prompt: str, width: int, height: int) -> list[int]:
        """``<first> Generate an image of WxH according to the following prompt: ... <separator>`` and the size."""
        text = f"Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
        return [self._first, *self._encode(text), *self.unconditional(width, height)]

    def unconditional(self, width: int, height: int) -> list[int]:
        """``<begin> rows columns``."""
        return [self._begin, self._count(height), self._count(width)]

    def _encode(self, text: str) -> list[int]:
        """The text and the separator. What a user writes opens no picture, even where it spells a special token."""
        separator: int | None = self._tokenizer.token_to_id(_SEPARATOR)
        self._tokenizer.encode_special_tokens = True
        if separator is None:  # not a token of this tokenizer: the authors' code then writes it out
            text += _SEPARATOR
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if separator is None else [*ids, separator]

    def _count(self, pixels: int) -> int:
        return self._id(f"<reserved{8800 + pixels // PATCH:05d}>")

    def _id(self, token: str) -> int:
        index: int | None = self._tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer of this Lumina-mGPT 2.0 checkpoint has no token {token!r}")
        return index
