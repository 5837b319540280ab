"""What the runner remembers of each request between steps, and how a step's rows are planned from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sjd_vllm.config import SJDConfig, SJDParams
from sjd_vllm.engine.draft_pool import DraftingRule, DraftPool
from sjd_vllm.engine.guidance_pairs import RUNNER_KEY
from sjd_vllm.models.family import ImageFamily


@dataclass
class RequestState:
    """One user's request; its companion has none of its own.

    Attributes:
        request_id, partner_id: the two halves; partner_id is None without guidance.
        seed: key of the request's noise.
        iteration: Jacobi steps taken so far.
        window: longest window asked for.
        num_tokens: length of the finished output.
        pool, slot: where its drafts and their laws lie.
        drafts: token ids of the current window, as handed to the scheduler.
        held_step: the runner's last step that was held to bring the window back.
    """

    request_id: str
    partner_id: str | None
    seed: int
    window: int
    num_tokens: int
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float
    pool: DraftPool
    slot: int
    iteration: int = 0
    drafts: list[int] = field(default_factory=list)
    held_step: int | None = None

    def must_restore_window(self, num_drafts: int, step: int) -> bool:
        """Whether to hold this step because the forward saw none of the window's drafts, as after a preemption.

        Going on without them would be exact too, but the picture would then depend on who shared its batch. If the
        window is missing in the very next step again, the token budget has no room for it, and it is given up.
        """
        is_lost = bool(self.drafts) and num_drafts == 0
        if not is_lost or self.held_step == step - 1:
            return False
        self.held_step = step
        return True


class RequestStates:
    """All requests of a runner, and the pools that hold their windows."""

    def __init__(self, config: SJDConfig, family: ImageFamily | None, *, vocab_size: int, device: torch.device) -> None:
        self._config = config
        self._family = family
        self._vocab_size = vocab_size
        self._device = device
        self._states: dict[str, RequestState] = {}
        self.pools: dict[DraftingRule, DraftPool] = {}

    def __len__(self) -> int:
        return len(self._states)

    def get(self, request_id: str, sampling_params: Any) -> RequestState | None:
        """The state of a request, made when first seen; None for a companion, which follows its main."""
        state = self._states.get(request_id)
        if state is None and not sampling_params.extra_args[RUNNER_KEY]["is_companion"]:
            state = self._states[request_id] = self._new(request_id, sampling_params)
        return state

    def _new(self, request_id: str, sampling: Any) -> RequestState:
        params = SJDParams.from_extra_args(sampling.extra_args)
        runner_args = sampling.extra_args[RUNNER_KEY]
        window = self._config.num_speculative_tokens
        if params.num_speculative_tokens is not None:
            window = min(window, params.num_speculative_tokens)
        pool = self._pool(params, sampling.allowed_token_ids)
        return RequestState(
            request_id=request_id,
            partner_id=runner_args["partner"],
            seed=runner_args["seed"],
            window=window,
            num_tokens=sampling.max_tokens,
            guidance_scale=params.guidance_scale,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            pool=pool,
            slot=pool.take_slot(),
        )

    def _pool(self, params: SJDParams, allowed_token_ids: list[int] | None) -> DraftPool:
        grammar = None
        if params.image_size is not None:
            if self._family is None:
                raise ValueError("image_size was asked of a model that is no image model")
            grammar = self._family.grammar(self._family.size(params.image_size))
        rule = DraftingRule(
            grammar=grammar,
            token_ids=None if allowed_token_ids is None else tuple(sorted(set(allowed_token_ids))),
            redraft=params.redraft or self._config.redraft,
            first_guess=params.first_guess or self._config.first_guess,
        )
        if rule not in self.pools:
            self.pools[rule] = DraftPool(
                rule,
                width=self._config.num_speculative_tokens,
                vocab_size=self._vocab_size,
                reuse_threshold=self._config.reuse_threshold,
                device=self._device,
            )
        return self.pools[rule]

    def remove(self, request_id: str) -> None:
        """Forget a finished request and free its window; the memory of an unused rule goes with its last request."""
        state = self._states.pop(request_id, None)
        if state is None:
            return
        state.pool.free_slot(state.slot)
        if state.pool.num_used == 0:
            del self.pools[state.pool.rule]
