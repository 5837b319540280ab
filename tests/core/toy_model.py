"""A model small enough to know everything about it: target probabilities for every prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sjd_vllm.core import process_target


@dataclass(frozen=True)
class ToyModel:
    """`num_tokens` tokens out of V columns; each token depends strongly on all tokens before it."""

    logits: Tensor  # [num_prefixes, V] float64, prefixes by length, then by their digits
    uncond_logits: Tensor  # the same shape; a second model to guide with
    probs: Tensor  # [num_prefixes, V]: after the target pipeline
    num_tokens: int
    legal: Tensor | None = None  # bool [num_tokens, V]

    @classmethod
    def random(
        cls,
        seed: int,
        *,
        num_columns: int = 3,
        num_tokens: int = 5,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        legal: Tensor | None = None,
    ) -> ToyModel:
        generator = torch.Generator().manual_seed(seed)
        prefix_lengths = [n for n in range(num_tokens) for _ in range(num_columns**n)]
        shape = (2, len(prefix_lengths), num_columns)
        tables = 1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        probs = process_target(
            tables[:1],
            uncond_logits=None if guidance_scale is None else tables[1:],
            guidance_scale=None if guidance_scale is None else torch.tensor([guidance_scale], dtype=torch.float64),
            legal=None if legal is None else legal[prefix_lengths][None],
            temperature=None if temperature is None else torch.tensor([temperature], dtype=torch.float64),
            top_k=top_k,
        )[0]
        return cls(tables[0], tables[1], probs, num_tokens, legal)

    @property
    def num_columns(self) -> int:
        return self.probs.shape[1]

    @property
    def num_sequences(self) -> int:
        return self.num_columns**self.num_tokens

    def legal_at(self, positions: Tensor) -> Tensor | None:
        return None if self.legal is None else self.legal[positions.clamp(max=self.num_tokens - 1)]

    def next_token_logits(self, prefixes: list[list[int]]) -> Tensor:
        return self.logits[[self._row(prefix) for prefix in prefixes]]

    def next_uncond_logits(self, prefixes: list[list[int]]) -> Tensor:
        return self.uncond_logits[[self._row(prefix) for prefix in prefixes]]

    def _row(self, prefix: list[int]) -> int:
        row = 0
        for token in prefix:
            row = row * self.num_columns + token + 1
        return row

    def joint(self) -> Tensor:
        """The ordinary joint distribution [V ** num_tokens], sequences in the order of `sequence_index`."""
        joint = torch.ones(1, dtype=torch.float64)
        start, count = 0, 1
        for _ in range(self.num_tokens):
            joint = (joint[:, None] * self.probs[start : start + count]).flatten()
            start, count = start + count, count * self.num_columns
        return joint

    def sequence_index(self, tokens: Tensor) -> Tensor:
        """tokens [S, num_tokens] -> [S]."""
        return (tokens * self.num_columns ** torch.arange(self.num_tokens - 1, -1, -1)).sum(1)

    def probs_along(self, tokens: Tensor) -> Tensor:
        """tokens [S, n] -> p after 0..n of them [S, n+1, V]; prefixes longer than the model's give any row."""
        row = torch.zeros(len(tokens), tokens.shape[1] + 1, dtype=torch.long)
        for n in range(tokens.shape[1]):
            row[:, n + 1] = (row[:, n] * self.num_columns + tokens[:, n] + 1).clamp(max=len(self.probs) - 1)
        return self.probs[row]
