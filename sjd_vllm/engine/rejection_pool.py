"""Requests whose drafts are tested by rejection: windows and their laws, kept on the device, one slot a request.

Dimension letters: R pictures, w longest window that the step's forward saw, W window, V columns.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
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
    process_target,
)
from sjd_vllm.engine.batch_step import Pictures, ScheduledBatch
from sjd_vllm.engine.slot_table import Array, SlotTable
from sjd_vllm.models.grammar import ImageGrammar


class RejectionPool:
    """All requests under one drafting rule.

    Args:
        grammar: legal ids by position, or None for free text.
        token_ids: long; the ids of the columns, ascending.
        width: W, the longest window of any request.
        redraft, first_guess, reuse_threshold: the strategies, as in `SJDConfig`.
    """

    def __init__(
        self,
        grammar: ImageGrammar | None,
        token_ids: Tensor,
        *,
        width: int,
        redraft: str,
        first_guess: str,
        reuse_threshold: float,
        device: torch.device,
    ) -> None:
        self.slots = SlotTable()
        self._grammar = grammar
        if grammar is not None:
            self._legal_sets = grammar.legal_sets.to(device)
            self._set_of_position = grammar.set_of_position.to(device)
        self._token_ids = token_ids.to(device)
        first, last = int(token_ids[0]), int(token_ids[-1])
        # a contiguous range of ids is a view of the logits, not a copy
        self._range = slice(first, last + 1) if last - first + 1 == len(token_ids) else None
        self._redraft = get_redraft(redraft, threshold=reuse_threshold)
        self._first_guess = get_first_guess(first_guess)
        self._row_stride = grammar.row_stride if grammar is not None else None
        self._width = width
        self._device = device
        self._num_context = self._first_guess.num_context_slots(self._row_stride)
        self._window = self._empty_window(0)
        self._context = self._empty_context(0)
        # the drafts as the scheduler gets them
        self._draft_ids = np.zeros((0, width), np.int64)
        self._lengths = np.zeros(0, np.int64)

    def _empty_window(self, slots: int) -> DraftWindow:
        return DraftWindow.empty(slots, self._width, len(self._token_ids), dtype=torch.float32, device=self._device)

    def _empty_context(self, slots: int) -> Context:
        return Context.empty(
            slots,
            self._num_context,
            len(self._token_ids) if self._first_guess.needs_probs else None,
            dtype=torch.float32,
            device=self._device,
        )

    def take_slot(self, **settings: float) -> int:
        """A slot for a new request, with an empty window."""
        slot = self.slots.take(**settings)
        extra = len(self.slots) - len(self._lengths)
        if extra:
            self._window = _concatenate(self._window, self._empty_window(extra))
            self._context = _concatenate(self._context, self._empty_context(extra))
            self._draft_ids = np.concatenate([self._draft_ids, np.zeros((extra, self._width), np.int64)])
            self._lengths = np.concatenate([self._lengths, np.zeros(extra, np.int64)])
        self._window.lengths[slot] = 0
        self._context.lengths[slot] = 0
        self._lengths[slot] = 0
        return slot

    def windows(self, slots: Array, positions: Array) -> list[list[int]]:
        """The drafts [at most W each] that requests want scored next."""
        drafts, lengths = self._draft_ids[slots].tolist(), self._lengths[slots].tolist()
        return [row[:length] for row, length in zip(drafts, lengths, strict=True)]

    def ready(self, pictures: Pictures, step: int) -> Array:
        """bool [R]: False for one more step where the forward saw none of the window's drafts, as after a preemption.

        Going on without them would be exact too, but the picture would then depend on who shared its batch. If the
        window is missing in the very next step again, the token budget has no room for it, and it is given up.
        """
        held_step = self.slots.held_step
        is_held = (self._lengths[pictures.slots] > 0) & (pictures.num_drafts == 0)
        is_held &= held_step[pictures.slots] != step - 1
        held_step[pictures.slots[is_held]] = step
        return ~is_held

    def step(self, pictures: Pictures, batch: ScheduledBatch, emitted: Array) -> Array:
        """Score, emit and redraft; writes `emitted` [B, >= w + 1] and returns how many tokens are final, int64 [R]."""
        slots, width = self._to_device(pictures.slots), int(pictures.num_drafts.max())
        window, positions = self._window.select(slots), self._to_device(pictures.positions)
        seen = batch.padded_drafts(pictures.cond, width)
        is_usable = self._token_ids[window.tokens[:, :width]] == seen
        is_usable &= torch.arange(width, device=self._device) < self._to_device(pictures.num_drafts)[:, None]
        table, own = self.slots, pictures.slots
        result: StepResult = jacobi_step(
            self._target_probs(pictures, batch, width, positions),
            DraftWindow(
                window.tokens[:, :width],
                window.probs[:, :width],
                torch.minimum(is_usable.long().cumprod(1).sum(1), window.lengths),
            ),
            positions=positions,
            next_lengths=self._to_device(table.window[own]),
            next_width=self._width,
            legal_at=self._legal_at,
            context=self._context.select(slots),
            row_stride=self._row_stride,
            redraft=self._redraft,
            first_guess=self._first_guess,
            randomness=CounterNoise(self._to_device(table.seed[own]), self._to_device(table.iteration[own])),
        )
        table.iteration[own] += 1
        # One token of the next step is its correction or bonus, so a longer window could not be used up.
        left = self._to_device(table.num_tokens[own]) - positions - result.num_emitted - 1
        next_window = result.window.truncated(left.clamp_min(0))
        _write(self._window, slots, next_window)
        _write(self._context, slots, result.context)
        self._draft_ids[own] = self._token_ids[next_window.tokens].cpu().numpy()
        self._lengths[own] = next_window.lengths.cpu().numpy()
        token_ids = torch.where(result.tokens >= 0, self._token_ids[result.tokens.clamp_min(0)], -1).cpu().numpy()
        emitted[pictures.cond, : width + 1] = token_ids
        emitted[pictures.uncond, : width + 1] = token_ids
        num_final: Array = result.num_emitted.cpu().numpy()
        return num_final

    def _target_probs(self, pictures: Pictures, batch: ScheduledBatch, width: int, positions: Tensor) -> Tensor:
        """float32 [R, w + 1, V]: guidance, grammar, temperature, top-k and top-p applied."""
        table, own = self.slots, pictures.slots
        scale, temperature = table.guidance_scale[own], table.temperature[own]
        top_k, top_p = table.top_k[own], table.top_p[own]
        is_guided = bool((scale != 1).any())
        highest, lowest = int(top_k.max()), int(top_k.min())
        slots = torch.arange(width + 1, device=self._device)
        return process_target(
            self._columns(batch.padded_logits(pictures.cond, width)),
            uncond_logits=self._columns(batch.padded_logits(pictures.uncond, width)) if is_guided else None,
            guidance_scale=self._to_device(scale) if is_guided else None,
            legal=self._legal_at(positions[:, None] + slots),
            temperature=self._to_device(temperature) if (temperature != 1).any() else None,
            # one value for all rows selects without a count a row
            top_k=None if highest == 0 else highest if highest == lowest else self._to_device(top_k),
            top_p=self._to_device(top_p) if (top_p < 1).any() else None,
            max_top_k=highest,
        )

    def _to_device(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _columns(self, logits: Tensor) -> Tensor:
        """float32 [..., V] of the rule's columns from logits [..., vocabulary]."""
        picked = logits[..., self._range] if self._range is not None else logits[..., self._token_ids]
        return picked.float()

    def _legal_at(self, positions: Tensor) -> Tensor | None:
        """bool [..., V]: the legal columns at output positions; None if all are. Past the end: those of the end."""
        if self._grammar is None:
            return None
        return self._legal_sets[self._set_of_position[positions.clamp_max(len(self._set_of_position) - 1)]]


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
