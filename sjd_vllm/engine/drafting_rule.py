"""What requests must share to be stepped together: which tokens are legal where, and the strategy of drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd_vllm.config import SJDConfig, SJDParams
from sjd_vllm.engine.slot_table import Array
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.grammar import ImageGrammar


@dataclass(frozen=True)
class DraftingRule:
    """Compares by value, so that it finds the requests of its kind.

    Attributes:
        grammar: legal ids by position, or None for free text.
        token_ids: the legal ids when there is no grammar, ascending; None is the whole vocabulary.
        redraft, first_guess: strategy names.
    """

    grammar: ImageGrammar | None
    token_ids: tuple[int, ...] | None
    redraft: str
    first_guess: str

    @classmethod
    def of(cls, params: SJDParams, sampling: Any, config: SJDConfig, family: ImageFamily | None) -> DraftingRule:
        """The rule of a request. Raises ValueError where it asks for a picture and the model makes none."""
        grammar = None
        if params.image_size is not None:
            if family is None:
                raise ValueError("image_size was asked of a model that is no image model")
            grammar = family.grammar(family.size(params.image_size))
        allowed = sampling.allowed_token_ids
        return cls(
            grammar=grammar,
            token_ids=None if allowed is None else tuple(sorted(set(allowed))),
            redraft=params.redraft_of(config),
            first_guess=params.first_guess_of(config),
        )

    def legal_ids(self, vocab_size: int) -> Tensor:
        """Long, ascending; every id that is legal at some position."""
        if self.grammar is not None:
            return self.grammar.token_ids
        return torch.arange(vocab_size) if self.token_ids is None else torch.tensor(self.token_ids)

    def legal_sets(self, vocab_size: int, num_positions: int) -> tuple[list[Tensor], Array]:
        """Ids (long, ascending) that are legal together, and which of these sets each position has, int64 [T].

        num_positions: T of free text; a grammar knows its own.
        """
        ids = self.legal_ids(vocab_size)
        if self.grammar is None:
            return [ids], np.zeros(num_positions, np.int64)
        return [ids[columns] for columns in self.grammar.legal_sets], self.grammar.set_of_position.numpy()
