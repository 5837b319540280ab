"""Requests that decode under fixed noise (strategy `gumbel`): sequences of drafts on the host, choices on the device.

Each request has its whole sequence as drafts from the start, first guesses at the end of it; a step replaces the ones
that it scored by the choices of the noise. One copy to the device and one back a step.

Dimension letters: R pictures, N scored positions, T positions of the longest sequence, W window, V ids of a legal set.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sjd_kernels.sweep_cpu import sweep_cpu
from sjd_vllm.core import uniform_choice
from sjd_vllm.engine.batch_step import Pictures, ScheduledBatch
from sjd_vllm.engine.legal_set import LegalSet, SettingsSpan
from sjd_vllm.engine.slot_table import Array, SlotTable


class FixedNoisePool:
    """All requests under one grammar, or one set of legal ids.

    Args:
        legal_sets: long, ascending token ids; each set is legal at some positions.
        set_of_position: int64 [T]; which set is legal where.
        width: W, the longest window of any request.
    """

    def __init__(self, legal_sets: list[Tensor], set_of_position: Array, *, width: int, device: torch.device) -> None:
        self.slots = SlotTable()
        self._sets = [LegalSet(ids, device) for ids in legal_sets]
        self._set_of_position = set_of_position
        counts = np.array([len(legal.token_ids) for legal in self._sets])
        self._num_legal = counts[set_of_position]
        self._only_id = np.array([legal.only_id for legal in self._sets])
        self._width = width
        self._drafts = np.zeros((0, len(set_of_position)), np.int64)

    def take_slot(self, **settings: float) -> int:
        """A slot for a new request, its sequence filled with first guesses: any legal token, equally likely."""
        slot = self.slots.take(**settings)
        if len(self._drafts) < len(self.slots):
            grown = np.zeros((len(self.slots), self._drafts.shape[1]), np.int64)
            grown[: len(self._drafts)] = self._drafts
            self._drafts = grown
        positions = torch.arange(self._drafts.shape[1])
        seeds = torch.full_like(positions, int(settings["seed"]))
        places = uniform_choice(torch.from_numpy(self._num_legal), seeds=seeds, positions=positions).numpy()
        for index, legal in enumerate(self._sets):
            where = self._set_of_position == index
            self._drafts[slot, where] = legal.token_ids.numpy()[places[where]]
        return slot

    def windows(self, slots: Array, positions: Array) -> list[list[int]]:
        """The drafts [at most W each] that requests at `positions` [R] want scored next."""
        # one token of a step is no draft, so a longer window could not be used up
        lengths = np.minimum(self.slots.window[slots], self.slots.num_tokens[slots] - positions - 1).clip(0)
        columns = positions[:, None] + np.arange(self._width)
        drafts = self._drafts[slots[:, None], columns.clip(max=self._drafts.shape[1] - 1)].tolist()
        return [row[:length] for row, length in zip(drafts, lengths.tolist(), strict=True)]

    def ready(self, pictures: Pictures, step: int) -> Array:
        """bool [R]: all of them. A picture does not depend on which of its drafts a step saw."""
        return np.ones(len(pictures), dtype=bool)

    def step(self, pictures: Pictures, batch: ScheduledBatch, emitted: Array) -> Array:
        """Score, emit and refresh; writes `emitted` [B, >= W + 1] and returns how many tokens are final, int64 [R]."""
        owner, offsets = pictures.owner, pictures.offsets
        positions = pictures.positions[owner] + offsets
        choices = self._choices(pictures, batch, positions)
        num_final: Array = sweep_cpu(self._drafts, pictures.slots[owner], positions, choices, pictures.starts)
        is_final = offsets < num_final[owner]
        for rows in (pictures.cond, pictures.uncond):
            emitted[rows[owner[is_final]], offsets[is_final]] = choices[is_final]
        return num_final

    def _choices(self, pictures: Pictures, batch: ScheduledBatch, positions: Array) -> Array:
        """Token ids int64 [N]; the device is not asked where only one is legal."""
        sets = self._set_of_position[positions]
        choices = self._only_id[sets]
        for index in np.unique(sets[choices < 0]):
            where = (sets == index).nonzero()[0]
            choices[where] = self._chosen(index, pictures, batch, positions, where)
        return choices

    def _chosen(self, index: int, pictures: Pictures, batch: ScheduledBatch, positions: Array, where: Array) -> Array:
        owner, offsets = pictures.owner[where], pictures.offsets[where]
        own, slots = pictures.slots[owner], self.slots
        settings = {
            "guidance_scale": slots.guidance_scale,
            "temperature": slots.temperature,
            "top_k": slots.top_k,
            "top_p": slots.top_p,
        }
        span = SettingsSpan.of(**{name: column[pictures.slots] for name, column in settings.items()})
        per_row = {
            "rows": batch.first[pictures.cond[owner]] + offsets,
            "uncond_rows": batch.first[pictures.uncond[owner]] + offsets,
            "seeds": slots.seed[own],
            "positions": positions[where],
            **{name: column[own] for name, column in settings.items()},
        }
        device = batch.logits.device
        on_device = {name: torch.from_numpy(values).to(device) for name, values in per_row.items()}
        chosen: Array = self._sets[index].choices(batch.logits, span, **on_device).cpu().numpy()
        return chosen
