"""Speculative Jacobi decoding on vLLM's V1 model runner.

A step: the stock runner has computed logits for each request's last token and its scheduled drafts. `_sample` pairs
the guidance halves, scores the drafts, emits, and makes the next windows; `propose_draft_token_ids` hands those back.
Rejected drafts need no clean-up: the next forward overwrites their KV slots.

Dimension letters: B rows of vLLM's batch, R pictures, W window, V columns.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput

from sjd_vllm.engine.admission import engine_config, family_of
from sjd_vllm.engine.batch_step import Pictures, ScheduledBatch
from sjd_vllm.engine.request_states import Pool, RequestState, RequestStates
from sjd_vllm.engine.slot_table import Array

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """The requests of a batch that share a pool: their slots and rows, int64 [R]."""

    pool: Pool
    slots: Array
    cond: Array
    uncond: Array


class SJDRunnerMixin:
    """Placed before a V1 model runner class. Adds no constructor: the CPU runner gets it after it is built."""

    _step = 0
    _grouped_ids: tuple[str, ...] = ()
    _groups: tuple[Group, ...] = ()

    @cached_property
    def _sjd(self) -> RequestStates:
        config = engine_config(self.vllm_config)
        if config is None:
            raise RuntimeError("this runner needs an engine started with --speculative-model=[sjd]")
        return RequestStates(
            config,
            family_of(self.model_config.model),
            vocab_size=self.model_config.get_vocab_size(),
            max_num_tokens=self.model_config.max_model_len,
            device=self.device,
        )

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        self._sjd.remove(req_id)
        self._grouped_ids, self._groups = (), ()
        super()._on_request_state_removed(req_id, req_state)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # There is no drafter with a length of its own; the scheduler cuts windows at the model's length.
        return True

    def propose_draft_token_ids(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """The next window of every row of the batch, made by `_sample`."""
        return self._next_drafts

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        """Emit one or more tokens a row: int32 [B, max window + 1], -1 padded."""
        if logits is None or spec_decode_metadata is None:
            raise RuntimeError("speculative Jacobi decoding got a step without logits or without draft metadata")
        self._step += 1
        batch = ScheduledBatch(logits, spec_decode_metadata)
        num_rows = len(batch.num_drafts)
        emitted = np.full((num_rows, batch.width + 1), -1, np.int32)
        discard = self.discard_request_mask.np[:num_rows]
        num_output = (self.input_batch.num_tokens_no_spec - self.input_batch.num_prompt_tokens)[:num_rows]
        drafts: list[list[int]] = [[] for _ in range(num_rows)]
        is_held = np.ones(num_rows, dtype=bool)
        for group in self._groups_of_batch(num_rows):
            is_ready = ~discard[group.cond] & ~discard[group.uncond]
            is_ready &= num_output[group.cond] == num_output[group.uncond]
            positions = num_output[group.cond] + group.pool.slots.num_given[group.slots]
            pictures = Pictures(
                group.cond,
                group.uncond,
                np.minimum(batch.num_drafts[group.cond], batch.num_drafts[group.uncond]),
                group.slots,
                positions,
            )
            is_ready[is_ready] = group.pool.ready(pictures.select(is_ready), self._step)
            if is_ready.any():
                positions[is_ready] += group.pool.step(pictures.select(is_ready), batch, emitted)
                is_held[group.cond[is_ready]] = is_held[group.uncond[is_ready]] = False
            windows = group.pool.windows(group.slots, positions)
            for cond, uncond, window in zip(group.cond.tolist(), group.uncond.tolist(), windows, strict=True):
                drafts[cond] = drafts[uncond] = window
        # vLLM emits nothing for these: halves that wait, and rows whose logits are not numbers
        discard |= is_held | (emitted[:, 0] < 0)
        self._next_drafts = drafts
        return SamplerOutput(sampled_token_ids=torch.from_numpy(emitted), logprobs_tensors=None)

    def _groups_of_batch(self, num_rows: int) -> tuple[Group, ...]:
        """The batch's requests by pool, made anew only when the batch has changed; halves without a partner are out."""
        batch = self.input_batch
        ids = tuple(batch.req_ids[:num_rows])
        if ids == self._grouped_ids:
            return self._groups
        members: dict[int, list[tuple[RequestState, int, int]]] = {}
        for cond, request_id in enumerate(ids):
            try:
                state = self._sjd.get(request_id, self.requests[request_id].sampling_params)
            except Exception:
                # The others of the batch go on; the scheduler ends this one, which gets no token, with an error.
                _LOGGER.exception("request %s cannot be decoded", request_id)
                continue
            if state is None:
                continue
            uncond = cond if state.partner_id is None else batch.req_id_to_index.get(state.partner_id)
            if uncond is not None:
                members.setdefault(id(state.pool), []).append((state, cond, uncond))
        self._grouped_ids = ids
        self._groups = tuple(
            Group(rows[0][0].pool, *np.array([(state.slot, cond, uncond) for state, cond, uncond in rows]).T)
            for rows in members.values()
        )
        return self._groups
