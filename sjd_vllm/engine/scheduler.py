"""vLLM's scheduler, extended so that the two halves of a guidance pair advance together or not at all.

What the stock scheduler decides about chunks, budgets, prefix hits and blocks stays as it is. The runner refuses to
emit for a half whose other half is not ready; here that half is rolled back by one token, so that it recomputes its
last token until it is paired.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from sjd_vllm.config import SJDParams
from sjd_vllm.engine.guidance_pairs import GuidancePairs, noise_seed, prepare_request


class SJDScheduler(Scheduler):
    """Synchronous V1 scheduler with guidance pairs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pairs = GuidancePairs()

    def add_request(self, request: Request) -> None:
        """Queue the request and, if it is guided, its companion right behind it."""
        if request.sampling_params is None or request.request_id in self.requests:
            super().add_request(request)
            return
        params = SJDParams.from_extra_args(request.sampling_params.extra_args)
        if not params.is_guided:
            prepare_request(request, partner_id=None, is_companion=False, noise_seed=noise_seed(request))
            super().add_request(request)
            return
        companion = self.pairs.open(request, params)
        super().add_request(request)
        super().add_request(companion)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step's work; a half whose partner was preempted is preempted first."""
        self._preempt_split_pairs()
        # With num_spec_tokens > 0 the stock scheduler pads a new one-token prefill with placeholder drafts of -1.
        num_spec_tokens, self.num_spec_tokens = self.num_spec_tokens, 0
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.num_spec_tokens = num_spec_tokens

    def _preempt_split_pairs(self) -> None:
        # Not inside _preempt_request: schedule() holds the running list in locals while it preempts.
        now = time.monotonic()
        for half in reversed(self.running.copy()):
            other = self.requests.get(self.pairs.partner(half.request_id) or "")
            if other is None or other.status != RequestStatus.PREEMPTED:
                continue
            self.running.remove(half)
            self._preempt_request(half, now)
            # Side by side at the head, the main first: so at most one main ever runs without its companion.
            main, companion = (other, half) if self.pairs.is_companion(half.request_id) else (half, other)
            self.waiting.remove_requests([main, companion])
            self.waiting.prepend_request(companion)
            self.waiting.prepend_request(main)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Book the step, roll back the halves that were held, end companions, hide them from the outputs."""
        num_tokens_before = {
            request_id: self.requests[request_id].num_tokens
            for request_id in scheduler_output.num_scheduled_tokens
            if request_id in self.requests
        }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, num_tokens in num_tokens_before.items():
            request = self.requests.get(request_id)
            if request is not None:
                self._roll_back_if_held(request, num_tokens)
        self._finish_lone_companions()
        for output in outputs.values():
            output.outputs = [o for o in output.outputs if not self.pairs.is_companion(o.request_id)]
            if output.finished_requests:
                output.finished_requests = {i for i in output.finished_requests if not self.pairs.is_companion(i)}
        return outputs

    @staticmethod
    def _roll_back_if_held(request: Request, num_tokens_before: int) -> None:
        is_held = (
            request.status == RequestStatus.RUNNING
            and request.num_tokens == num_tokens_before
            and request.num_computed_tokens >= num_tokens_before
        )
        if is_held:
            request.num_computed_tokens = num_tokens_before - 1
            request.spec_token_ids = []

    def _finish_lone_companions(self) -> None:
        lone = [companion for companion, main in self.pairs.companions() if main not in self.requests]
        if lone:
            super().finish_requests(lone, RequestStatus.FINISHED_ABORTED)
            for companion in lone:
                self.pairs.close(companion)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Finish requests together with their companions; the companions are not in the result."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        if request_ids is not None:
            request_ids = self.pairs.with_partners(request_ids)
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self.pairs.close(request.request_id)
        return [request for request in finished if not self.pairs.is_companion(request.request_id)]

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Stock statistics, a pair counted as the one request that the user sent."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and len(self.pairs):
            running = sum(self.pairs.is_companion(request.request_id) for request in self.running)
            stats.num_running_reqs -= running
            stats.num_waiting_reqs -= len(self.pairs) - running
        return stats

    def make_spec_decoding_stats(
        self, spec_decoding_stats: SpecDecodingStats | None, *args: Any, **kwargs: Any
    ) -> SpecDecodingStats | None:
        """Stock statistics of drafts; a pair drafts once."""
        if self.pairs.is_companion(kwargs["request_id"]):
            return spec_decoding_stats
        stats: SpecDecodingStats | None = super().make_spec_decoding_stats(spec_decoding_stats, *args, **kwargs)
        return stats
