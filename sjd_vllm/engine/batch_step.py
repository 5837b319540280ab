"""From a step's logits to emitted tokens: what both model runners share.

Dimension letters: B rows of vLLM's batch, R pictures (one or two rows each), w longest window of these, V columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sjd_vllm.core import process_target
from sjd_vllm.engine.request_states import RequestState


@dataclass(frozen=True)
class Picture:
    """A request that emits in this step.

    Attributes:
        cond, uncond: its rows in vLLM's batch; the same row twice without guidance.
        num_drafts: how many drafts both rows were given.
        position: output position of the first draft.
    """

    state: RequestState
    cond: int
    uncond: int
    num_drafts: int
    position: int


class ScheduledBatch:
    """vLLM's flat logits, [sum of (drafts + 1), vocabulary] in row order, addressed by row and slot."""

    def __init__(self, logits: Tensor, spec_decode_metadata: Any) -> None:
        self.logits = logits
        self.num_drafts: list[int] = list(spec_decode_metadata.num_draft_tokens)
        self._draft_token_ids = spec_decode_metadata.draft_token_ids
        self._first_draft: list[int] = []
        total = 0
        for count in self.num_drafts:
            self._first_draft.append(total)
            total += count

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.num_drafts)

    @property
    def width(self) -> int:
        """Drafts of the row that has most."""
        return max(self.num_drafts)

    def logits_of(self, rows: list[int], width: int) -> Tensor:
        """[R, width + 1, vocabulary] of batch rows; slots that a row does not have repeat its last."""
        slots = torch.arange(width + 1)
        first = torch.tensor([self._first_draft[row] + row for row in rows])
        last = torch.tensor([self.num_drafts[row] for row in rows])
        index = first[:, None] + torch.minimum(slots, last[:, None])
        return self.logits[index.to(self.logits.device)]

    def drafts_of(self, rows: list[int], width: int) -> Tensor:
        """Token ids [R, width] that the forward saw; -1 in slots that a row does not have."""
        slots = torch.arange(width)
        first = torch.tensor([self._first_draft[row] for row in rows])
        last = torch.tensor([self.num_drafts[row] for row in rows])
        is_there = slots < last[:, None]
        index = torch.where(is_there, first[:, None] + slots, 0).to(self.logits.device)
        if not len(self._draft_token_ids):
            return index.new_full(index.shape, -1)
        return torch.where(is_there.to(self.logits.device), self._draft_token_ids[index].long(), -1)


def step_pictures(pictures: list[Picture], batch: ScheduledBatch, emitted: Tensor) -> None:
    """Score, emit and redraft pictures that share a pool; writes `emitted` [B, >= w + 1] and the states' drafts."""
    device = batch.logits.device
    states = [picture.state for picture in pictures]
    pool = states[0].pool
    width = max(picture.num_drafts for picture in pictures)
    slots, positions, seeds, iterations, windows, num_tokens, num_drafts, cond_rows, uncond_rows = torch.tensor(
        [
            [
                s.slot,
                p.position,
                s.seed,
                s.iteration,
                s.window,
                s.num_tokens,
                p.num_drafts,
                p.cond,
                p.uncond,
            ]
            for p, s in zip(pictures, states, strict=True)
        ],
        device=device,
    ).unbind(1)

    drafts, lengths = pool.drafts(slots)
    seen = batch.drafts_of([picture.cond for picture in pictures], width)
    is_usable = (drafts[:, :width] == seen) & (torch.arange(width, device=device) < num_drafts[:, None])
    usable = torch.minimum(is_usable.long().cumprod(1).sum(1), lengths)

    token_ids, next_lengths = pool.step(
        slots,
        _target_probs(pictures, batch, width, positions),
        usable,
        positions=positions,
        seeds=seeds,
        iterations=iterations,
        windows=windows,
        num_tokens=num_tokens,
    )
    emitted[cond_rows, : width + 1] = token_ids.int()
    emitted[uncond_rows, : width + 1] = token_ids.int()
    next_drafts = pool.drafts(slots)[0].tolist()
    for state, ids, length in zip(states, next_drafts, next_lengths.tolist(), strict=True):
        state.iteration += 1
        state.drafts = ids[:length]


def _target_probs(pictures: list[Picture], batch: ScheduledBatch, width: int, positions: Tensor) -> Tensor:
    """float32 [R, width + 1, V]: guidance, grammar, temperature, top-k and top-p applied."""
    states = [picture.state for picture in pictures]
    pool = states[0].pool
    device = batch.logits.device
    uncond_logits = guidance_scale = temperature = top_k = top_p = None
    if any(state.partner_id is not None for state in states):
        uncond_logits = pool.columns(batch.logits_of([picture.uncond for picture in pictures], width))
        guidance_scale = torch.tensor([state.guidance_scale for state in states], device=device)
    if any(state.temperature != 1 for state in states):
        temperature = torch.tensor([state.temperature for state in states], device=device)
    top_ks = [max(state.top_k, 0) for state in states]
    if any(top_ks):
        # one value for all rows selects without a count a row
        top_k = top_ks[0] if len(set(top_ks)) == 1 else torch.tensor(top_ks, device=device)
    if any(state.top_p < 1 for state in states):
        top_p = torch.tensor([state.top_p for state in states], device=device)
    slots = torch.arange(width + 1, device=device)
    return process_target(
        pool.columns(batch.logits_of([picture.cond for picture in pictures], width)),
        uncond_logits=uncond_logits,
        guidance_scale=guidance_scale,
        legal=pool.legal_at(positions[:, None] + slots),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_top_k=max(top_ks),
    )
