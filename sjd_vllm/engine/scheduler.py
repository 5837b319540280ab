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
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from sjd_vllm.config import SJDConfig, SJDParams
from sjd_vllm.counters import EngineCounters
from sjd_vllm.engine.admission import engine_config
from sjd_vllm.engine.guidance_pairs import GuidancePairs, is_adaptive, noise_seed, prepare_request
from sjd_vllm.engine.parent_watch import end_with_parent
from sjd_vllm.engine.window_control import WindowController

# A resumed request may be held for one step with both halves ready, until its window is back.
_MAX_STALLS = 4


class SJDScheduler(Scheduler):
    """Synchronous V1 scheduler with guidance pairs, and with windows by load."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()  # the scheduler lives in the engine's process
        self.pairs = GuidancePairs()
        self._num_stalls: dict[str, int] = {}
        self._config = engine_config(self.vllm_config) or SJDConfig()
        self._windows = WindowController(self._config.num_speculative_tokens)
        self._counters = EngineCounters(self.vllm_config.instance_id, is_writer=True)
        self._refused: dict[str, list[int]] = {}  # by request, the drafts of this step that were not accepted
        self._step_started: float | None = None  # None while there is nothing to do
        self._step_size = (0, 0)  # rows and tokens of the step under way

    def add_request(self, request: Request) -> None:
        """Queue the request and, if it is guided, its companion right behind it."""
        if request.sampling_params is None or request.request_id in self.requests:
            super().add_request(request)
            return
        params = SJDParams.from_extra_args(request.sampling_params.extra_args)
        adapts = params.is_adaptive(self._config)
        if not params.is_guided:
            prepare_request(
                request,
                partner_id=None,
                is_companion=False,
                is_adaptive=adapts,
                noise_seed=noise_seed(request),
            )
            super().add_request(request)
            return
        companion = self.pairs.open(request, params, is_adaptive=adapts)
        super().add_request(request)
        super().add_request(companion)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step's work; a half whose partner was preempted is preempted first, and windows are cut to the load."""
        self._observe_step()
        self._preempt_split_pairs()
        self._cut_windows()
        # With num_spec_tokens > 0 the stock scheduler pads a new one-token prefill with placeholder drafts of -1.
        num_spec_tokens, self.num_spec_tokens = self.num_spec_tokens, 0
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.num_spec_tokens = num_spec_tokens
        self._step_size = (len(output.num_scheduled_tokens), output.total_num_scheduled_tokens)
        return output

    def _observe_step(self) -> None:
        """Tell the controller how long the last step took, with all that came between it and this one."""
        now = time.perf_counter()
        if self._step_started is not None and self._step_size[1]:
            self._windows.observe_step(*self._step_size, now - self._step_started)
        self._step_started = now

    def _cut_windows(self) -> None:
        """Exact: under fixed noise a draft decides when a token comes, never which."""
        adaptive = [request for request in self.running if is_adaptive(request)]
        others = [request for request in self.running if not is_adaptive(request)]
        window = self._windows.choose(
            num_rows=len(adaptive),
            num_pictures=sum(not self.pairs.is_companion(request.request_id) for request in adaptive),
            other_rows=len(others),
            other_tokens=sum(1 + len(request.spec_token_ids) for request in others),
        )
        self._counters.put("window", window)
        for request in adaptive:
            if len(request.spec_token_ids) > window:
                request.spec_token_ids = request.spec_token_ids[:window]

    def _preempt_split_pairs(self) -> None:
        # Not inside _preempt_request: schedule() holds the running list in locals while it preempts.
        now = time.monotonic()
        for half in reversed(self.running.copy()):
            other = self.requests.get(self.pairs.partner(half.request_id) or "")
            if other is None or other.status != RequestStatus.PREEMPTED:
                continue
            self.running.remove(half)
            self._preempt_request(half, now)
            self._counters.add("guidance_preemptions_total")
            # Side by side at the head, the main first: so at most one main ever runs without its companion.
            main, companion = (other, half) if self.pairs.is_companion(half.request_id) else (half, other)
            self.waiting.remove_requests([main, companion])
            self.waiting.prepend_request(companion)
            self.waiting.prepend_request(main)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Book the step, roll back the halves that were held, end companions, hide them from the outputs."""
        scheduled = [self.requests[i] for i in scheduler_output.num_scheduled_tokens if i in self.requests]
        num_tokens_before = {request.request_id: request.num_tokens for request in scheduled}
        self._observe_lone_tokens(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._observe_drafts(scheduled, scheduler_output.scheduled_spec_decode_tokens, num_tokens_before)
        held = [
            self.requests[request_id]
            for request_id, num_tokens in num_tokens_before.items()
            if request_id in self.requests and self._is_held(self.requests[request_id], num_tokens)
        ]
        self._fail_stalled({request.request_id for request in held})
        self._counters.add("steps_total")
        self._counters.add("guidance_stalls_total", len(held))
        self._counters.put("guidance_pairs", len(self.pairs))
        for request in held:
            request.num_computed_tokens = request.num_tokens - 1
            request.spec_token_ids = []
        self._finish_lone_companions()
        for output in outputs.values():
            output.outputs = [o for o in output.outputs if not self.pairs.is_companion(o.request_id)]
            if output.finished_requests:
                output.finished_requests = {i for i in output.finished_requests if not self.pairs.is_companion(i)}
        if not self.requests:
            self._step_started = None
        return outputs

    def _observe_lone_tokens(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> None:
        """Count forwards without drafts in the requests' metrics too, where stock code has those with drafts alone."""
        for request_id, index in model_runner_output.req_id_to_index.items():
            metrics = self.requests[request_id].spec_decode_metrics if request_id in self.requests else None
            has_drafts = request_id in scheduler_output.scheduled_spec_decode_tokens
            if metrics is not None and not has_drafts and model_runner_output.sampled_token_ids[index]:
                metrics.observe(0, 0, detailed=self.spec_decode_metrics_level == "detailed")

    def _observe_drafts(
        self, scheduled: list[Request], drafts_of: dict[str, list[int]], num_tokens_before: dict[str, int]
    ) -> None:
        """Tell controller and counters what became of the drafts; companions have the drafts of their mains."""
        self._refused = {}
        for request in scheduled:
            request_id = request.request_id
            drafts = drafts_of.get(request_id)
            num_emitted = request.num_tokens - num_tokens_before[request_id]
            if not drafts or not num_emitted or self.pairs.is_companion(request_id):
                continue
            if is_adaptive(request):
                self._windows.observe_acceptance(len(drafts), num_emitted - 1)
            self._counters.add("drafts_scored_total", len(drafts))
            self._counters.add("drafts_accepted_total", num_emitted - 1)
            self._refused[request_id] = drafts[num_emitted:]

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the next windows, and count which of the old drafts stand in them."""
        super().update_draft_token_ids(draft_token_ids)
        for request_id, refused in self._refused.items():
            request = self.requests.get(request_id)
            if request is not None:
                pairs = list(zip(refused, request.spec_token_ids, strict=False))
                self._counters.add("drafts_refreshed_total", len(pairs))
                self._counters.add("drafts_kept_total", sum(old == new for old, new in pairs))

    @staticmethod
    def _is_held(request: Request, num_tokens_before: int) -> bool:
        """Whether the whole request was computed and yet got no token."""
        return (
            request.status == RequestStatus.RUNNING
            and request.num_tokens == num_tokens_before
            and request.num_computed_tokens >= num_tokens_before
        )

    def _fail_stalled(self, held: set[str]) -> None:
        """End requests that had all they needed, several steps in a row, and got no token: their logits are NaN."""
        mains = {i for i in held if not self.pairs.is_companion(i) and self.pairs.partner(i) in (None, *held)}
        self._num_stalls = {i: self._num_stalls.get(i, 0) + 1 for i in mains}
        # the stock scheduler finishes these with an error, each alone, when it books the next step
        self.grammar_compile_error_reqs.update(i for i, n in self._num_stalls.items() if n >= _MAX_STALLS)

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
