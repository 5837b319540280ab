"""Prompt template of Emu3-Gen, its negative prompt, and the tokenizer of either published layout.

Source: baaivision/Emu3, image_generation.py (`POSITIVE_PROMPT`, `NEGATIVE_PROMPT`) and emu3/mllm/processing_emu3.py
(`Emu3Processor.__call__`, mode "G"): ``<bos> text <image start> H*W <image token>``, H rows and W columns of codes. The
positive prompt is appended to what the user wrote; the negative one is a prompt like any other.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

POSITIVE_PROMPT = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)

_BOS, _BEGIN_OF_IMAGE, _BEGIN_OF_CODES = "<|extra_203|>", "<|image start|>", "<|image token|>"
_RANKS_FILE, _VISION_FILE = "emu3.tiktoken", "emu3_vision_tokens.txt"

# emu3/mllm/tokenization_emu3.py: how text is cut into words, and the special tokens in front of those of pictures
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))


class Emu3Prompts:
    """Prompts to token ids. Text that spells a special token is text, not that token.

    Raises ValueError where the checkpoint has no tokenizer, or one without the tokens that frame a picture.
    """

    def __init__(self, checkpoint: Path, *, is_original: bool) -> None:
        read = _original_tokenizer if is_original else _converted_tokenizer
        self._encode, self.id_of = read(checkpoint)
        self._bos, self._begin, self._codes = (self.id_of(name) for name in (_BOS, _BEGIN_OF_IMAGE, _BEGIN_OF_CODES))

    def conditional(self, prompt: str, rows: int, columns: int) -> list[int]:
        """What the user wrote, with the authors' positive prompt behind it."""
        return self._framed(prompt + POSITIVE_PROMPT, rows, columns)

    def unconditional(self, negative_prompt: str | None, rows: int, columns: int) -> list[int]:
        """A negative prompt, by default the authors'."""
        return self._framed(negative_prompt or NEGATIVE_PROMPT, rows, columns)

    def _framed(self, text: str, rows: int, columns: int) -> list[int]:
        return [self._bos, *self._encode(text), self._begin, *self._encode(f"{rows}*{columns}"), self._codes]


_Tokenizer = tuple[Callable[[str], list[int]], Callable[[str], int]]


def _original_tokenizer(checkpoint: Path) -> _Tokenizer:
    """emu3.tiktoken and emu3_vision_tokens.txt, which hold the ids in their order."""
    import tiktoken

    for name in (_RANKS_FILE, _VISION_FILE):
        if not (checkpoint / name).is_file():
            raise ValueError(f"the tokenizer of this Emu3 checkpoint is missing: {checkpoint / name}")
    lines = (line.split() for line in (checkpoint / _RANKS_FILE).read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    vision = [line.strip() for line in (checkpoint / _VISION_FILE).read_text().splitlines() if line.strip()]
    specials = {token: len(ranks) + index for index, token in enumerate((*_TEXT_SPECIALS, *vision))}
    encoding = tiktoken.Encoding("Emu3", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens=specials)

    def encode(text: str) -> list[int]:
        return encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    return encode, _lookup(specials.get)


def _converted_tokenizer(checkpoint: Path) -> _Tokenizer:
    from tokenizers import Tokenizer

    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"the tokenizer of this Emu3 checkpoint is missing: {file}")
    tokenizer: Any = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode, _lookup(tokenizer.token_to_id)


def _lookup(get: Callable[[str], int | None]) -> Callable[[str], int]:
    def id_of(token: str) -> int:
        index = get(token)
        if index is None:
            raise ValueError(f"the tokenizer of this Emu3 checkpoint has no token {token!r}")
        return index

    return id_of
