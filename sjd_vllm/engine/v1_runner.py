"""Speculative Jacobi decoding on vLLM's V1 model runner.

A step: the stock runner has computed logits for each request's last token and its scheduled drafts. `_sample` pairs
the guidance halves, scores the drafts, emits, and makes the next windows; `propose_draft_token_ids` hands those back.
Rejected drafts need no clean-up: the next forward overwrites their KV slots.

Dimension letters: B rows of vLLM's batch, R pictures, W window, V columns.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput

from sjd_vllm.engine.admission import engine_config, family_of
from sjd_vllm.engine.batch_step import Picture, ScheduledBatch, step_pictures
from sjd_vllm.engine.request_states import RequestStates


class SJDRunnerMixin:
    """Placed before a V1 model runner class. Adds no constructor: the CPU runner gets it after it is built."""

    _step = 0

    @cached_property
    def _sjd(self) -> RequestStates:
        config = engine_config(self.vllm_config)
        if config is None:
            raise RuntimeError("this runner needs an engine started with --speculative-model=[sjd]")
        return RequestStates(
            config,
            family_of(self.model_config.model),
            vocab_size=self.model_config.get_vocab_size(),
            device=self.device,
        )

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        self._sjd.remove(req_id)
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
        emitted = logits.new_full((batch.num_rows, batch.width + 1), -1, dtype=torch.int32)
        by_pool: dict[int, list[Picture]] = defaultdict(list)
        for picture in self._pair_halves(batch.num_drafts):
            by_pool[id(picture.state.pool)].append(picture)
        for pictures in by_pool.values():
            step_pictures(pictures, batch, emitted)
        self._next_drafts = self._drafts_by_row(batch.num_rows)
        return SamplerOutput(sampled_token_ids=emitted, logprobs_tensors=None)

    def _pair_halves(self, num_drafts: list[int]) -> list[Picture]:
        """The pictures that emit in this step. All other rows are marked, so that vLLM emits nothing for them."""
        batch, discard = self.input_batch, self.discard_request_mask.np
        num_output = batch.num_tokens_no_spec - batch.num_prompt_tokens
        is_held = np.ones(len(num_drafts), dtype=bool)
        pictures = []
        for cond, request_id in enumerate(batch.req_ids[: len(num_drafts)]):
            state = self._sjd.get(request_id, self.requests[request_id].sampling_params)
            if state is None:
                continue
            uncond = cond if state.partner_id is None else batch.req_id_to_index.get(state.partner_id)
            if uncond is None or discard[cond] or discard[uncond] or num_output[cond] != num_output[uncond]:
                continue
            num_shared = min(num_drafts[cond], num_drafts[uncond])
            if state.must_restore_window(num_shared, self._step):
                continue
            is_held[[cond, uncond]] = False
            pictures.append(Picture(state, cond, uncond, num_shared, position=int(num_output[cond])))
        discard[: len(num_drafts)] |= is_held
        return pictures

    def _drafts_by_row(self, num_rows: int) -> list[list[int]]:
        batch, drafts = self.input_batch, [[] for _ in range(num_rows)]
        for row, request_id in enumerate(batch.req_ids[:num_rows]):
            state = self._sjd.get(request_id, self.requests[request_id].sampling_params)
            if state is not None:
                drafts[row] = state.drafts
                if state.partner_id in batch.req_id_to_index:
                    drafts[batch.req_id_to_index[state.partner_id]] = state.drafts
        return drafts
