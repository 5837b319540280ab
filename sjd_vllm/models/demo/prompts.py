"""Prompt template of the demo model: ``<bos> words <boi>``, and ``<bos> <boi>`` without a caption."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer


class DemoPrompts:
    """Captions to token ids. Case and punctuation do not matter; a word that the model never saw is <unk>."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._bos, self._boi = self._tokenizer.convert_tokens_to_ids(["<bos>", "<boi>"])

    def conditional(self, caption: str) -> list[int]:
        """``<bos> words <boi>``."""
        words: list[int] = self._tokenizer(caption, add_special_tokens=False)["input_ids"]
        return [self._bos, *words, self._boi]

    def unconditional(self) -> list[int]:
        """``<bos> <boi>``, which training showed in place of one caption in eight."""
        return [self._bos, self._boi]
