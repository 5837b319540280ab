"""Draft windows and their laws, kept on the device between steps, one slot a picture.

Dimension letters: R rows of a step (one a picture, its two guidance halves together), S slots, W window, V columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sjd_vllm.core import (
    Context,
    CounterNoise,
    DraftWindow,
    StepResult,
    get_first_guess,
    get_redraft,
    jacobi_step,
)
from sjd_vllm.models.grammar import ImageGrammar

_INITIAL_SLOTS = 4


@dataclass(frozen=True)
class DraftingRule:
    """What requests must share to be stepped together.

    Attributes:
        grammar: legal ids by position, or None for free text.
        token_ids: the columns' ids when there is no grammar, ascending; None is the whole vocabulary.
        redraft, first_guess: strategy names.
    """

    grammar: ImageGrammar | None
    token_ids: tuple[int, ...] | None
    redraft: str
    first_guess: str


class DraftPool:
    """The windows of all requests under one drafting rule. Grows as needed; slots are reused."""

    def __init__(
        self, rule: DraftingRule, *, width: int, vocab_size: int, reuse_threshold: float, device: torch.device
    ) -> None:
        grammar = rule.grammar
        if grammar is not None:
            ids = grammar.token_ids
            self._legal_sets = grammar.legal_sets.to(device)
            self._set_of_position = grammar.set_of_position.to(device)
        else:
            ids = torch.arange(vocab_size) if rule.token_ids is None else torch.tensor(rule.token_ids)
        self.rule = rule
        self.token_ids = ids.to(device)
        first, last = int(ids[0]), int(ids[-1])
        # a contiguous range of ids is a view of the logits, not a copy
        self._range = slice(first, last + 1) if last - first + 1 == len(ids) else None
        self._redraft = get_redraft(rule.redraft, threshold=reuse_threshold)
        self._first_guess = get_first_guess(rule.first_guess)
        self._row_stride = grammar.row_stride if grammar is not None else None
        self._width = width
        self._device = device
        self._num_context = self._first_guess.num_context_slots(self._row_stride)
        self._free: list[int] = []
        self.num_used = 0
        self._window = self._empty_window(0)
        self._context = self._empty_context(0)

    def _empty_window(self, slots: int) -> DraftWindow:
        return DraftWindow.empty(slots, self._width, len(self.token_ids), dtype=torch.float32, device=self._device)

    def _empty_context(self, slots: int) -> Context:
        return Context.empty(
            slots,
            self._num_context,
            len(self.token_ids) if self._first_guess.needs_probs else None,
            dtype=torch.float32,
            device=self._device,
        )

    def take_slot(self) -> int:
        """An empty slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.num_used += 1
        self._window.lengths[slot] = 0
        self._context.lengths[slot] = 0
        return slot

    def free_slot(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)
        self.num_used -= 1

    def _grow(self) -> None:
        old = len(self._window.lengths)
        extra = max(_INITIAL_SLOTS, old)
        self._window = _concatenate(self._window, self._empty_window(extra))
        self._context = _concatenate(self._context, self._empty_context(extra))
        self._free.extend(range(old + extra - 1, old - 1, -1))

    def columns(self, logits: Tensor) -> Tensor:
        """float32 [..., V] of the rule's columns from logits [..., vocabulary]."""
        picked = logits[..., self._range] if self._range is not None else logits[..., self.token_ids]
        return picked.float()

    def legal_at(self, positions: Tensor) -> Tensor | None:
        """bool [..., V]: the legal columns at output positions; None if all are. Past the end: those of the end."""
        if self.rule.grammar is None:
            return None
        return self._legal_sets[self._set_of_position[positions.clamp_max(len(self._set_of_position) - 1)]]

    def drafts(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Draft token ids, long [R, W], and how many of them are drafts, long [R]."""
        return self.token_ids[self._window.tokens[slots]], self._window.lengths[slots]

    def step(
        self,
        slots: Tensor,
        target_probs: Tensor,
        usable: Tensor,
        *,
        positions: Tensor,
        seeds: Tensor,
        iterations: Tensor,
        windows: Tensor,
        num_tokens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One Jacobi step of R pictures; their next windows replace the old ones.

        Args:
            slots: long [R].
            target_probs: float [R, w + 1, V] with w <= W, row j for output position positions + j.
            usable: long [R]; how many drafts, from the left, the forward really saw.
            positions: long [R]; output position of the first draft.
            seeds, iterations: long [R]; keys of the noise.
            windows: long [R]; longest next window.
            num_tokens: long [R]; length of the finished output, so that no step runs past it.

        Returns:
            Emitted token ids, long [R, w + 1], -1 padded, and the next windows' lengths, long [R].
        """
        width = target_probs.shape[1] - 1
        window = self._window.select(slots)
        result: StepResult = jacobi_step(
            target_probs,
            DraftWindow(window.tokens[:, :width], window.probs[:, :width], usable),
            positions=positions,
            next_lengths=windows,
            next_width=self._width,
            legal_at=self.legal_at,
            context=self._context.select(slots),
            row_stride=self._row_stride,
            redraft=self._redraft,
            first_guess=self._first_guess,
            randomness=CounterNoise(seeds, iterations),
        )
        # One token of the next step is its correction or bonus, so a longer window could not be used up.
        left = num_tokens - positions - result.num_emitted - 1
        next_window = result.window.truncated(left.clamp_min(0))
        _write(self._window, slots, next_window)
        _write(self._context, slots, result.context)
        return torch.where(result.tokens >= 0, self.token_ids[result.tokens.clamp_min(0)], -1), next_window.lengths


_Slotted = TypeVar("_Slotted", DraftWindow, Context)


def _tensors(slotted: DraftWindow | Context) -> list[Tensor]:
    return [value for value in (slotted.tokens, slotted.probs, slotted.lengths) if value is not None]


def _write(target: _Slotted, slots: Tensor, source: _Slotted) -> None:
    for to, value in zip(_tensors(target), _tensors(source), strict=True):
        to[slots] = value


def _concatenate(first: _Slotted, second: _Slotted) -> _Slotted:
    probs = None if first.probs is None or second.probs is None else torch.cat([first.probs, second.probs])
    return type(first)(
        tokens=torch.cat([first.tokens, second.tokens]),
        probs=probs,  # type: ignore[arg-type]
        lengths=torch.cat([first.lengths, second.lengths]),
    )
