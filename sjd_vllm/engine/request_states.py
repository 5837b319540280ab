"""What the runner remembers of each request between steps, by pool and slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sjd_vllm.config import GUMBEL, SJDConfig, SJDParams
from sjd_vllm.engine.fixed_noise_pool import FixedNoisePool
from sjd_vllm.engine.guidance_pairs import RUNNER_KEY
from sjd_vllm.engine.rejection_pool import RejectionPool
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.grammar import ImageGrammar

Pool = FixedNoisePool | RejectionPool


@dataclass(frozen=True)
class DraftingRule:
    """What requests must share to be stepped together.

    Attributes:
        grammar: legal ids by position, or None for free text.
        token_ids: the legal ids when there is no grammar, ascending; None is the whole vocabulary.
        redraft, first_guess: strategy names.
    """

    grammar: ImageGrammar | None
    token_ids: tuple[int, ...] | None
    redraft: str
    first_guess: str


@dataclass(frozen=True)
class RequestState:
    """Where one user's request lies; its companion has none of its own.

    Attributes:
        partner_id: the companion; None without guidance.
        rule, pool, slot: where its settings and drafts are.
    """

    partner_id: str | None
    rule: DraftingRule
    pool: Pool
    slot: int


class RequestStates:
    """All requests of a runner, and the pools that hold their windows."""

    def __init__(
        self,
        config: SJDConfig,
        family: ImageFamily | None,
        *,
        vocab_size: int,
        max_num_tokens: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self._family = family
        self._vocab_size = vocab_size
        self._max_num_tokens = max_num_tokens
        self._device = device
        self._states: dict[str, RequestState] = {}
        self.pools: dict[DraftingRule, Pool] = {}

    def __len__(self) -> int:
        return len(self._states)

    def get(self, request_id: str, sampling_params: Any) -> RequestState | None:
        """The state of a request, made when first seen; None for a companion, which follows its main."""
        state = self._states.get(request_id)
        if state is None and not sampling_params.extra_args[RUNNER_KEY]["is_companion"]:
            state = self._states[request_id] = self._new(sampling_params)
        return state

    def _new(self, sampling: Any) -> RequestState:
        params = SJDParams.from_extra_args(sampling.extra_args)
        runner_args = sampling.extra_args[RUNNER_KEY]
        window = self.config.num_speculative_tokens
        if params.num_speculative_tokens is not None:
            window = min(window, params.num_speculative_tokens)
        rule = self._rule(params, sampling.allowed_token_ids)
        if rule not in self.pools:
            self.pools[rule] = self._new_pool(rule)
        pool = self.pools[rule]
        slot = pool.take_slot(
            seed=runner_args["seed"],
            guidance_scale=params.guidance_scale,
            temperature=sampling.temperature,
            top_k=max(sampling.top_k, 0),
            top_p=sampling.top_p,
            window=window,
            num_tokens=params.num_given_tokens + sampling.max_tokens,
            num_given=params.num_given_tokens,
        )
        return RequestState(runner_args["partner"], rule, pool, slot)

    def _rule(self, params: SJDParams, allowed_token_ids: list[int] | None) -> DraftingRule:
        grammar = None
        if params.image_size is not None:
            if self._family is None:
                raise ValueError("image_size was asked of a model that is no image model")
            grammar = self._family.grammar(self._family.size(params.image_size))
        return DraftingRule(
            grammar=grammar,
            token_ids=None if allowed_token_ids is None else tuple(sorted(set(allowed_token_ids))),
            redraft=params.redraft_of(self.config),
            first_guess=params.first_guess_of(self.config),
        )

    def _new_pool(self, rule: DraftingRule) -> Pool:
        width, grammar = self.config.num_speculative_tokens, rule.grammar
        if grammar is not None:
            ids = grammar.token_ids
        else:
            ids = torch.arange(self._vocab_size) if rule.token_ids is None else torch.tensor(rule.token_ids)
        if rule.redraft == GUMBEL:
            legal_sets, set_of_position = [ids], np.zeros(self._max_num_tokens, np.int64)
            if grammar is not None:
                legal_sets = [ids[columns] for columns in grammar.legal_sets]
                set_of_position = grammar.set_of_position.numpy()
            return FixedNoisePool(legal_sets, set_of_position, width=width, device=self._device)
        return RejectionPool(
            grammar,
            ids,
            width=width,
            redraft=rule.redraft,
            first_guess=rule.first_guess,
            reuse_threshold=self.config.reuse_threshold,
            device=self._device,
        )

    def remove(self, request_id: str) -> None:
        """Forget a finished request and free its slot; the memory of an unused rule goes with its last request."""
        state = self._states.pop(request_id, None)
        if state is None:
            return
        state.pool.slots.free(state.slot)
        if state.pool.slots.num_used == 0:
            del self.pools[state.rule]
