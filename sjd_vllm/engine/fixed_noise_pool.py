"""Requests that decode under fixed noise (strategy `gumbel`): sequences of drafts on the host, choices on the device.

Each request has its whole sequence as drafts from the start, first guesses at the end of it; a step replaces the ones
that it scored by the choices of the noise. One copy to the device and one back a step.

Dimension letters: R pictures, N scored positions, T positions of the longest sequence, W window, V ids of a legal set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd_vllm.core import gumbel_choices, sweep, uniform_choice
from sjd_vllm.engine.batch_step import Pictures, ScheduledBatch
from sjd_vllm.engine.slot_table import Array, SlotTable


class LegalSet:
    """The token ids that are legal at some positions, ascending."""

    def __init__(self, token_ids: Tensor, device: torch.device) -> None:
        self.token_ids = token_ids.numpy()
        self._device_ids = token_ids.to(device)
        first, last = int(token_ids[0]), int(token_ids[-1])
        # a contiguous range of ids is a view of the logits, not a copy
        self._range = slice(first, last + 1) if last - first + 1 == len(token_ids) else None

    def choices(self, logits: Tensor, rows: Tensor, uncond_rows: Tensor | None, **settings: Any) -> Tensor:
        """What the noise picks for some rows of logits [*, vocabulary]; see `gumbel_choices`."""
        columns = logits[:, self._range] if self._range is not None else logits[:, self._device_ids]
        return gumbel_choices(
            columns[rows].float(),
            self._device_ids,
            uncond_logits=None if uncond_rows is None else columns[uncond_rows].float(),
            **settings,
        )


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
        self._only_id = np.array([legal.token_ids[0] if len(legal.token_ids) == 1 else -1 for legal in self._sets])
        self._width = width
        self._device = device
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
            self._drafts[slot, where] = legal.token_ids[places[where]]
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
        num_final = sweep(
            torch.from_numpy(self._drafts),
            torch.from_numpy(pictures.slots[owner]),
            torch.from_numpy(positions),
            torch.from_numpy(choices),
            torch.from_numpy(pictures.starts),
        ).numpy()
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
        slots = self.slots
        owner, offsets = pictures.owner[where], pictures.offsets[where]
        own = pictures.slots[owner]
        scale, temperature, top_p = slots.guidance_scale[own], slots.temperature[own], slots.top_p[own]
        rows, uncond_rows, seeds, position, top_k = self._to_device(
            np.stack(
                [
                    batch.first[pictures.cond[owner]] + offsets,
                    batch.first[pictures.uncond[owner]] + offsets,
                    slots.seed[own],
                    positions[where],
                    slots.top_k[own],
                ]
            )
        )
        is_guided = bool((scale != 1).any())
        highest, lowest = int(slots.top_k[own].max()), int(slots.top_k[own].min())
        chosen = self._sets[index].choices(
            batch.logits,
            rows,
            uncond_rows if is_guided else None,
            seeds=seeds,
            positions=position,
            guidance_scale=self._to_device(scale) if is_guided else None,
            temperature=self._to_device(temperature) if (temperature != 1).any() else None,
            # one value for all rows selects without a count a row
            top_k=None if highest == 0 else highest if highest == lowest else top_k,
            top_p=self._to_device(top_p) if (top_p < 1).any() else None,
            max_top_k=highest,
        )
        ids: Array = chosen.cpu().numpy()
        return ids

    def _to_device(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self._device)
