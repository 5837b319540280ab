"""A step's logits and drafts, addressed by row and slot; and the pictures that emit in it.

Dimension letters: B rows of vLLM's batch, R pictures (one or two rows each), N scored positions of these pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd_vllm.engine.slot_table import Array


class ScheduledBatch:
    """vLLM's flat logits, [sum of (drafts + 1), vocabulary] in row order.

    Attributes:
        num_drafts: int64 [B]; drafts that each row was scheduled with.
        first: int64 [B]; where each row's logits begin.
    """

    def __init__(self, logits: Tensor, spec_decode_metadata: Any) -> None:
        self.logits = logits
        self.num_drafts: Array = np.array(spec_decode_metadata.num_draft_tokens, dtype=np.int64)
        self.first: Array = np.cumsum(self.num_drafts + 1) - self.num_drafts - 1
        self._draft_token_ids = spec_decode_metadata.draft_token_ids

    @property
    def width(self) -> int:
        """Drafts of the row that has most."""
        return int(self.num_drafts.max())

    def padded_logits(self, rows: Array, width: int) -> Tensor:
        """[R, width + 1, vocabulary] of batch rows; slots that a row does not have repeat its last."""
        index = self.first[rows][:, None] + np.minimum(np.arange(width + 1), self.num_drafts[rows][:, None])
        return self.logits[torch.from_numpy(index).to(self.logits.device)]

    def padded_drafts(self, rows: Array, width: int) -> Tensor:
        """Token ids [R, width] that the forward saw; -1 in slots that a row does not have."""
        slots = np.arange(width)
        is_there = slots < self.num_drafts[rows][:, None]
        # draft_token_ids has no place for a row's last slot, so a row begins there one earlier for each row before it
        index = np.where(is_there, (self.first[rows] - rows)[:, None] + slots, 0)
        if not len(self._draft_token_ids):
            return torch.full(index.shape, -1, device=self.logits.device)
        device = self.logits.device
        drafts = self._draft_token_ids[torch.from_numpy(index).to(device)].long()
        return torch.where(torch.from_numpy(is_there).to(device), drafts, -1)


@dataclass(frozen=True)
class ScoredRows:
    """Rows of vLLM's batch whose drafts are scored together.

    Attributes:
        cond, uncond: int64 [R]; rows of the batch, the same row twice without guidance.
        num_drafts: int64 [R]; how many drafts both rows were scheduled with.
    """

    cond: Array
    uncond: Array
    num_drafts: Array

    def __len__(self) -> int:
        return len(self.cond)

    @cached_property
    def starts(self) -> Array:
        """int64 [R]; where each picture's scored positions begin among the N."""
        return np.cumsum(self.num_drafts + 1) - self.num_drafts - 1

    @cached_property
    def owner(self) -> Array:
        """int64 [N]; the picture that a scored position belongs to."""
        return np.repeat(np.arange(len(self)), self.num_drafts + 1)

    @cached_property
    def offsets(self) -> Array:
        """int64 [N]; slot of the window, 0 the first."""
        return np.arange(len(self.owner)) - self.starts[self.owner]


@dataclass(frozen=True)
class Pictures(ScoredRows):
    """Requests of one pool that emit in a step.

    Attributes:
        slots: int64 [R]; in the pool.
        positions: int64 [R]; output position of the first draft.
    """

    slots: Array
    positions: Array

    def select(self, which: Array) -> Pictures:
        """Some of them, by a mask or by index."""
        if which.dtype == np.bool_ and which.all():
            return self
        return Pictures(
            self.cond[which], self.uncond[which], self.num_drafts[which], self.slots[which], self.positions[which]
        )
