"""The first draft of a slot that has never been looked at, together with its true law q.

q may depend on anything left of the slot and on nothing else. Every law is confined to the slot's legal
columns, so a forced position (one legal column) always drafts the forced token with a one-hot q.
Where a neighbour is of no use (there is none, its token is illegal here, its distribution has no mass on the
legal columns) the guess falls back: above -> left -> uniform.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from .randomness import Purpose, Randomness
from .redraft import unknown_name
from .window import History


class FirstGuess(ABC):
    """How a new slot gets its first draft."""

    name: ClassVar[str]
    needs_probs: ClassVar[bool] = False
    """Whether the context must hold distributions, not tokens only."""

    def num_context_slots(self, row_stride: int | None) -> int:
        """How many committed positions before slot 0 the strategy may look at (H).

        row_stride: tokens of an image row, end-of-line included, or None.
        """
        return 0

    @abstractmethod
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
        """Drafts [R, N] and their laws q [R, N, V] for the slots at `positions` [R, N]; used at `where` [R, N].

        uniform_probs [R, N, V]: uniform over each slot's legal columns, zero on the others.
        """


class ParallelGuess(FirstGuess):
    """A first guess whose laws do not depend on each other's drafts, so that all slots are drawn at once."""

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
        probs = self.draft_probs(history, uniform_probs, positions=positions, row_stride=row_stride)
        return randomness.draw(probs, purpose=Purpose.FIRST_GUESS, positions=positions, where=where), probs

    @abstractmethod
    def draft_probs(
        self, history: History, uniform_probs: Tensor, *, positions: Tensor, row_stride: int | None
    ) -> Tensor:
        """The laws q [R, N, V] for the slots at `positions` [R, N]; arguments as in `guess`."""


class Uniform(ParallelGuess):
    """Any legal column, equally likely."""

    name = "uniform"

    def draft_probs(
        self, history: History, uniform_probs: Tensor, *, positions: Tensor, row_stride: int | None
    ) -> Tensor:
        return uniform_probs


class RepeatLeft(ParallelGuess):
    """The token of the left neighbour (see `_left`)."""

    name = "repeat_left"

    def num_context_slots(self, row_stride: int | None) -> int:
        return 1  # the left neighbour of a first draft may be the last but one known token

    def draft_probs(
        self, history: History, uniform_probs: Tensor, *, positions: Tensor, row_stride: int | None
    ) -> Tensor:
        tokens, _, is_known = _left(history, uniform_probs)
        return prefer_legal(_one_hot(tokens, is_known, uniform_probs), uniform_probs)


class LeftProbs(ParallelGuess):
    """A draw from the distribution behind the left neighbour's token."""

    name = "left_probs"
    needs_probs = True

    def num_context_slots(self, row_stride: int | None) -> int:
        return 1

    def draft_probs(
        self, history: History, uniform_probs: Tensor, *, positions: Tensor, row_stride: int | None
    ) -> Tensor:
        _, left, is_known = _left(history, uniform_probs)
        return prefer_legal(history.probs_at(left).masked_fill_(~is_known[..., None], 0), uniform_probs)


class RepeatAbove(RepeatLeft):
    """The token of the position above, one image row earlier."""

    name = "repeat_above"

    def num_context_slots(self, row_stride: int | None) -> int:
        return _num_slots_above(row_stride)

    def draft_probs(
        self, history: History, uniform_probs: Tensor, *, positions: Tensor, row_stride: int | None
    ) -> Tensor:
        fallback = super().draft_probs(history, uniform_probs, positions=positions, row_stride=row_stride)
        if row_stride is None:
            return fallback
        tokens, is_known = history.tokens_at(positions - row_stride)
        return prefer_legal(_one_hot(tokens, is_known, uniform_probs), fallback, is_legal=uniform_probs > 0)


class AboveProbs(LeftProbs):
    """A draw from the distribution behind the token above, one image row earlier."""

    name = "above_probs"

    def num_context_slots(self, row_stride: int | None) -> int:
        return _num_slots_above(row_stride)

    def draft_probs(
        self, history: History, uniform_probs: Tensor, *, positions: Tensor, row_stride: int | None
    ) -> Tensor:
        fallback = super().draft_probs(history, uniform_probs, positions=positions, row_stride=row_stride)
        if row_stride is None:
            return fallback
        above = positions - row_stride
        _, is_known = history.tokens_at(above)
        probs = history.probs_at(above).masked_fill_(~is_known[..., None], 0)
        return prefer_legal(probs, fallback, is_legal=uniform_probs > 0)


_FIRST_GUESSES: dict[str, type[ParallelGuess]] = {
    guess.name: guess for guess in (Uniform, RepeatLeft, RepeatAbove, LeftProbs, AboveProbs)
}
FIRST_GUESS_NAMES = tuple(_FIRST_GUESSES)


def get_first_guess(name: str) -> ParallelGuess:
    """The strategy of that name. Raises ValueError for an unknown name."""
    if name not in _FIRST_GUESSES:
        raise ValueError(unknown_name("first guess", name, FIRST_GUESS_NAMES))
    return _FIRST_GUESSES[name]()


def uniform_over_legal(legal: Tensor | None, positions: Tensor, like: Tensor) -> Tensor:
    """legal bool [R, N, V] or None (all) -> uniform over the legal columns [R, N, V]; zeros where none is legal.

    positions [R, N] and like [..., V] give the shape, and `like` the dtype.
    """
    if legal is None:
        num_columns = like.shape[-1]
        return like.new_full((1, 1, 1), 1.0 / max(num_columns, 1)).expand(*positions.shape, num_columns)
    probs = legal.to(like.dtype)
    return probs / probs.sum(-1, keepdim=True).clamp_(min=1)


def _left(history: History, uniform_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The left neighbour of each new slot: tokens, positions, is_known, all [R, N].

    It is the last known token, or the one before it where the last is illegal at the slot (an end-of-line
    says nothing about the pixel that follows). All new slots of a step share these two candidates.
    """
    num_requests, num_slots, _ = uniform_probs.shape
    candidates = torch.stack([history.last, history.last - 1], dim=1)
    tokens, is_known = history.tokens_at(candidates)
    per_slot = tokens[:, None, :].expand(num_requests, num_slots, 2)
    usable = (uniform_probs.gather(-1, per_slot) > 0) & is_known[:, None, :]
    choice = (~usable[..., 0]).long()
    return tokens.gather(1, choice), candidates.gather(1, choice), usable.any(-1)


def _num_slots_above(row_stride: int | None) -> int:
    # a new slot is at least one right of slot 0, so what is above it is at most row_stride - 1 before slot 0
    return 1 if row_stride is None else max(row_stride - 1, 1)


def _one_hot(tokens: Tensor, is_known: Tensor, like: Tensor) -> Tensor:
    """[R, N] -> [R, N, V]: all mass on the token where it is known, no mass elsewhere."""
    return torch.zeros_like(like, memory_format=torch.contiguous_format).scatter_(
        -1, tokens[..., None], is_known[..., None].to(like.dtype)
    )


def prefer_legal(weights: Tensor, fallback: Tensor, is_legal: Tensor | None = None) -> Tensor:
    """`weights` on the legal columns, renormalised; `fallback` where none of their mass is legal."""
    is_legal = fallback > 0 if is_legal is None else is_legal
    weights = weights.masked_fill(~is_legal, 0)
    mass = weights.sum(-1, keepdim=True)
    return torch.where(mass > torch.finfo(weights.dtype).tiny, weights / mass, fallback)
