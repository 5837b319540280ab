"""A first guess from the user's own function of the prefix; for `decode`, not for an engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .first_guess import FirstGuess, prefer_legal
from .randomness import Purpose, Randomness
from .window import History

PrefixFunction = Callable[[list[int]], Tensor | int]


class PrefixGuess(FirstGuess):
    """`guess_for(prefix)` gives the draft distribution [V] of the token after `prefix`, or one token id.

    The prefix holds the committed tokens and the drafts left of the slot, so each slot waits for the one
    before it: this strategy runs on the host, slot by slot, and needs the whole prefix as context. A guess
    without mass on the legal columns falls back to uniform.
    """

    name = "prefix"

    def __init__(self, guess_for: PrefixFunction, num_tokens: int) -> None:
        self._guess_for = guess_for
        self._num_tokens = num_tokens

    def num_context_slots(self, row_stride: int | None) -> int:
        return self._num_tokens

    def guess(
        self,
        history: History,
        uniform_probs: Tensor,
        *,
        positions: Tensor,
        where: Tensor,
        row_stride: int | None,
        randomness: Randomness,
    ) -> tuple[Tensor, Tensor]:
        prefixes = _known_prefixes(history)
        cache: dict[tuple[int, ...], Tensor] = {}
        tokens = torch.zeros_like(positions)
        probs = uniform_probs.clone()
        for slot in range(positions.shape[1]):
            rows = where[:, slot].nonzero()[:, 0].tolist()
            if not rows:
                continue
            proposed = uniform_probs[:, slot].clone()
            for row in rows:
                key = tuple(prefixes[row])
                if key not in cache:
                    cache[key] = self._checked(self._guess_for(list(key)), uniform_probs)
                proposed[row] = cache[key]
            probs[:, slot] = prefer_legal(proposed, uniform_probs[:, slot])
            tokens[:, slot] = randomness.draw(
                probs[:, slot], purpose=Purpose.FIRST_GUESS, positions=positions[:, slot], where=where[:, slot]
            )
            drafted = tokens[:, slot].tolist()
            for row in rows:
                prefixes[row].append(drafted[row])
        return tokens, probs

    def _checked(self, guess: Tensor | int, like: Tensor) -> Tensor:
        num_columns = like.shape[-1]
        if isinstance(guess, int):
            if not 0 <= guess < num_columns:
                raise ValueError(f"first_guess returned token {guess}; the model has tokens 0..{num_columns - 1}")
            return torch.zeros(num_columns, dtype=like.dtype).index_fill_(0, torch.tensor(guess), 1)
        probs = torch.as_tensor(guess, device=like.device)
        if probs.shape != (num_columns,):
            raise ValueError(
                f"first_guess must return an int token or draft probabilities [V] = [{num_columns}], "
                f"got a tensor of shape {tuple(probs.shape)}"
            )
        probs = probs.to(torch.float64)
        if not bool((probs >= 0).all()) or abs(float(probs.sum()) - 1) > 1e-3:
            raise ValueError(
                f"first_guess must return probabilities (>= 0, sum 1), got min {float(probs.min()):.4g} and "
                f"sum {float(probs.sum()):.4g}; apply softmax to logits first"
            )
        return (probs / probs.sum()).to(like.dtype)


def _known_prefixes(history: History) -> list[list[int]]:
    """All known tokens of each request, from position 0 on."""
    starts = (history.first - history.origin).tolist()
    stops = (history.last - history.origin + 1).tolist()
    rows = history.tokens.tolist()
    return [row[start:stop] for row, start, stop in zip(rows, starts, stops, strict=True)]
