"""Prompts of Chameleon and Anole, and the ids of the tokens that have a meaning of their own.

Sources: chameleon/inference/vocab.py (`VocabInfo`, `VocabTranslation`: names and the mapping of image tokens);
text2image.py and chameleon/inference/chameleon.py of GAIR-NLP/anole (`TokenManager.tokens_from_ui`, `ImageDecoder`): a
prompt is ``<s> instruction <END-OF-TURN> <START-OF-IMAGE>``, and the unconditional one ``<s> <START-OF-IMAGE>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sjd_vllm.models.chameleon.config import tokenizer_file

BEGIN_IMAGE, END_IMAGE = "<racm3:break>", "<eoss>"
BEGIN_SEQUENCE, END_TURN = "<s>", "<reserved08706>"
_IMAGE_PREFIX = "IMGIMG"
_DIGIT_OF_LETTER = str.maketrans({chr(ord("A") + digit): str(digit) for digit in range(10)})


def token_id(vocabulary: Mapping[str, int], token: str) -> int:
    """Raises ValueError for a token that the vocabulary lacks."""
    if token not in vocabulary:
        raise ValueError(f"the vocabulary of this checkpoint has no token {token!r}")
    return vocabulary[token]


def code_ids(vocabulary: Mapping[str, int]) -> list[int]:
    """The token id of each code, in the order of codes.

    Image tokens are named IMGIMG, the code's decimal digits as letters (A is 0), and Z. Raises ValueError for a name
    that is no number, and for codes that do not count from 0.
    """
    id_of_code: dict[int, int] = {}
    for token, index in vocabulary.items():
        if token.startswith(_IMAGE_PREFIX):
            digits = token[len(_IMAGE_PREFIX) : -1].translate(_DIGIT_OF_LETTER)
            if not digits.isdecimal():
                raise ValueError(f"the image token {token!r} names no code")
            id_of_code[int(digits)] = index
    if not id_of_code or sorted(id_of_code) != list(range(len(id_of_code))):
        raise ValueError(f"the vocabulary names {len(id_of_code)} image tokens that do not count from 0")
    return [id_of_code[code] for code in range(len(id_of_code))]


class ChameleonPrompts:
    """Instructions to token ids."""

    def __init__(self, checkpoint: Path, vocabulary: Mapping[str, int]) -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer_file(checkpoint)))
        self._bos, self._end_turn, self._begin_image = (
            token_id(vocabulary, token) for token in (BEGIN_SEQUENCE, END_TURN, BEGIN_IMAGE)
        )

    def conditional(self, prompt: str) -> list[int]:
        """``<s> instruction <END-OF-TURN> <START-OF-IMAGE>``."""
        return [*self.turn(prompt), self._begin_image]

    def unconditional(self) -> list[int]:
        """``<s> <START-OF-IMAGE>``."""
        return [self._bos, self._begin_image]

    def turn(self, text: str) -> list[int]:
        """``<s> text <END-OF-TURN>``."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._bos, *ids, self._end_turn]
