"""What one step knows: the draft window, the committed tokens before it, and both laid side by side.

Dimension letters, used in all of `core`:

    R  requests (rows of a batch)
    W  width of a draft window, padded; `lengths` says how much of each row is real
    N  width of the next draft window, padded
    V  columns of the target's token set (the caller may have narrowed the vocabulary to what is legal)
    H  context slots: committed positions kept for the first guesses that look at a neighbour

Tokens are int64 column indices. Positions are absolute: position 0 is a request's first generated token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """values [R, S, V], index [R, N] into S -> [R, N, V]. Copies whole rows; index must be in range."""
    num_requests, num_slots, num_columns = values.shape
    first = torch.arange(num_requests, device=values.device)[:, None] * num_slots
    rows = values.reshape(num_requests * num_slots, num_columns).index_select(0, (first + index).flatten())
    return rows.view(num_requests, index.shape[1], num_columns)


@dataclass(frozen=True)
class DraftWindow:
    """The drafts that wait for their test. Slots at or beyond `lengths` hold nothing meaningful."""

    tokens: Tensor  # [R, W] long
    probs: Tensor  # [R, W, V] q: the distribution that each draft was really drawn from
    lengths: Tensor  # [R] long, 0..W

    @classmethod
    def empty(
        cls,
        num_requests: int,
        width: int,
        num_columns: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> DraftWindow:
        """No drafts at all: what a request starts with."""
        return cls(
            tokens=torch.zeros(num_requests, width, dtype=torch.long, device=device),
            probs=torch.zeros(num_requests, width, num_columns, dtype=dtype, device=device),
            lengths=torch.zeros(num_requests, dtype=torch.long, device=device),
        )

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    def truncated(self, lengths: Tensor) -> DraftWindow:
        """The same drafts with no more than `lengths` [R] of them in each row.

        Exact as long as `lengths` was not chosen by looking at the drafts that remain or that go.
        """
        return DraftWindow(self.tokens, self.probs, torch.minimum(self.lengths, lengths))

    def select(self, rows: Tensor) -> DraftWindow:
        """The requests `rows` [M] (long), in that order."""
        return DraftWindow(self.tokens[rows], self.probs[rows], self.lengths[rows])


@dataclass(frozen=True)
class Context:
    """The H committed positions before slot 0, right-aligned: index H-1 is the position before slot 0."""

    tokens: Tensor  # [R, H] long
    probs: Tensor | None  # [R, H, V] the target distribution of each, or None where no strategy asks for it
    lengths: Tensor  # [R] long, 0..H: how many of the rightmost entries are real

    @classmethod
    def empty(
        cls,
        num_requests: int,
        num_slots: int = 0,
        num_columns: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Context:
        """Nothing committed yet. `num_columns` None keeps tokens only (see `FirstGuess.needs_probs`)."""
        probs = None
        if num_columns is not None:
            probs = torch.zeros(num_requests, num_slots, num_columns, dtype=dtype, device=device)
        return cls(
            tokens=torch.zeros(num_requests, num_slots, dtype=torch.long, device=device),
            probs=probs,
            lengths=torch.zeros(num_requests, dtype=torch.long, device=device),
        )

    @property
    def num_slots(self) -> int:
        return self.tokens.shape[1]

    def select(self, rows: Tensor) -> Context:
        """The requests `rows` [M] (long), in that order."""
        probs = None if self.probs is None else self.probs[rows]
        return Context(self.tokens[rows], probs, self.lengths[rows])


@dataclass(frozen=True)
class History:
    """Everything left of the slots that still need a first guess: committed, emitted and carried tokens.

    A first guess may depend on all of it and on nothing else.
    """

    tokens: Tensor  # [R, L] long
    probs: Tensor | None  # [R, L, V] the distribution that stands behind each token
    origin: Tensor  # [R] long: absolute position of index 0
    first: Tensor  # [R] long: absolute position of the first known token
    last: Tensor  # [R] long: absolute position of the last known token

    @classmethod
    def of_step(
        cls, context: Context, tokens: Tensor, probs: Tensor, positions: Tensor, lengths: Tensor, *, with_probs: bool
    ) -> History:
        """Lay `context` and the slots 0..lengths of this step (tokens [R, W+1], probs [R, W+1, V]) side by side."""
        stored = None
        if with_probs:
            stored = probs
            if context.num_slots:
                assert context.probs is not None
                stored = torch.cat([context.probs, probs], dim=1)
        return cls(
            tokens=torch.cat([context.tokens, tokens], dim=1) if context.num_slots else tokens,
            probs=stored,
            origin=positions - context.num_slots,
            first=positions - context.lengths,
            last=positions + lengths,
        )

    def tokens_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [R, N] -> tokens [R, N] and whether each is known [R, N] (token 0 where it is not)."""
        known = (positions >= self.first[:, None]) & (positions <= self.last[:, None])
        tokens = self.tokens.gather(1, self._index(positions))
        known &= tokens >= 0
        return tokens.masked_fill(~known, 0), known

    def probs_at(self, positions: Tensor) -> Tensor:
        """positions [R, N] -> [R, N, V]; meaningful where `tokens_at` says known."""
        assert self.probs is not None
        return take_rows(self.probs, self._index(positions))

    def context_before(self, positions: Tensor, num_slots: int) -> Context:
        """The `num_slots` entries before `positions` [R], as the next step's context."""
        back = torch.arange(-num_slots, 0, device=positions.device)
        index = self._index(positions[:, None] + back)
        return Context(
            tokens=self.tokens.gather(1, index),
            probs=None if self.probs is None else take_rows(self.probs, index),
            lengths=(positions - self.first).clamp(max=num_slots),
        )

    def _index(self, positions: Tensor) -> Tensor:
        return (positions - self.origin[:, None]).clamp(0, self.tokens.shape[1] - 1)
