"""What the runner remembers of each request between steps, by pool and slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sjd_vllm.config import GUMBEL, SJDConfig, SJDParams
from sjd_vllm.engine.drafting_rule import DraftingRule
from sjd_vllm.engine.fixed_noise_pool import FixedNoisePool
from sjd_vllm.engine.guidance_pairs import RunnerArgs
from sjd_vllm.engine.rejection_pool import RejectionPool
from sjd_vllm.models.family import ImageFamily

Pool = FixedNoisePool | RejectionPool


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

    @property
    def num_rules(self) -> int:
        """Rules, and with them pools, that are in use."""
        return len(self.pools)

    def get(self, request_id: str, sampling_params: Any) -> RequestState | None:
        """The state of a request, made when first seen; None for a companion, which follows its main."""
        state = self._states.get(request_id)
        if state is None:
            runner_args = RunnerArgs.of(sampling_params)
            if runner_args is None:
                raise RuntimeError("the request was not prepared by our scheduler")
            if not runner_args.is_companion:
                state = self._states[request_id] = self._new(sampling_params, runner_args)
        return state

    def _new(self, sampling: Any, runner_args: RunnerArgs) -> RequestState:
        params = SJDParams.from_extra_args(sampling.extra_args)
        rule = DraftingRule.of(params, sampling, self.config, self._family)
        if rule not in self.pools:
            self.pools[rule] = self._new_pool(rule)
        pool = self.pools[rule]
        slot = pool.take_slot(
            seed=runner_args.seed,
            guidance_scale=params.guidance_scale,
            temperature=sampling.temperature,
            top_k=max(sampling.top_k, 0),
            top_p=sampling.top_p,
            window=runner_args.window,
            num_tokens=params.num_given_tokens + sampling.max_tokens,
            num_given=params.num_given_tokens,
        )
        return RequestState(runner_args.partner, rule, pool, slot)

    def _new_pool(self, rule: DraftingRule) -> Pool:
        width = self.config.num_speculative_tokens
        if rule.redraft == GUMBEL:
            legal_sets, set_of_position = rule.legal_sets(self._vocab_size, self._max_num_tokens)
            return FixedNoisePool(legal_sets, set_of_position, width=width, device=self._device)
        return RejectionPool(
            rule.grammar,
            rule.legal_ids(self._vocab_size),
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
