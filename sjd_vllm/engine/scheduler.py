"""vLLM's scheduler, extended so that the two halves of a guidance pair advance together or not at all.

What the stock scheduler decides about chunks, budgets, prefix hits and blocks stays as it is. The runner refuses to
emit for a half whose other half is not ready; here that half is rolled back to its last token, which it recomputes
until it is paired. That holds with a later step already handed out (asynchronous scheduling), too: what a step was
assumed to give and did not is taken back when its result comes, whatever was assumed since.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
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
from sjd_vllm.engine.guidance_pairs import GuidancePairs, RunnerArgs, noise_seed, prepare_request
from sjd_vllm.engine.parent_watch import end_with_parent
from sjd_vllm.engine.window_control import WindowController

# A resumed request may be held for one step with both halves ready, until its window is back.
_MAX_STALLS = 4


@dataclass(frozen=True)
class _Step:
    """A step that was handed to the runner.

    Attributes:
        scoring: the requests of which it scores tokens; the others are within their prompts.
        num_rows, num_drafting, num_tokens: its size; rows, those with drafts, and tokens.
    """

    scoring: list[Request]
    num_rows: int
    num_drafting: int
    num_tokens: int


def _runner_args(request: Request) -> RunnerArgs:
    runner_args = RunnerArgs.of(request.sampling_params)
    if runner_args is None:
        raise RuntimeError(f"request {request.request_id} was not prepared when it was added")
    return runner_args


class SJDSchedulerMixin:
    """Guidance pairs and windows by load, before one of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()  # the scheduler lives in the engine's process
        self.pairs = GuidancePairs()
        self._num_stalls: dict[str, int] = {}
        self._config = engine_config(self.vllm_config) or SJDConfig()
        self._windows = WindowController(self._config.num_speculative_tokens)
        self._counters = EngineCounters(self.vllm_config.instance_id, is_writer=True)
        self._counters.put("model_runner", 2 if self.use_v2_model_runner else 1)
        self._awaited: set[str] = set()  # halves that were preempted for their other halves before the last step
        self._drafting_from: dict[str, int] = {}  # by main, its tokens when its first window in a row was scored
        self._refused: dict[str, list[int]] = {}  # by request, the drafts of this step that were not accepted
        self._max_num_drafts = self.num_spec_tokens
        self._steps: dict[int, _Step] = {}  # by id() of the SchedulerOutput, until its result has come
        self._clock: float | None = None  # when the last step ended, or this one began; None while there is none

    def add_request(self, request: Request) -> None:
        """Queue the request and, if it is guided, its companion right behind it."""
        if request.sampling_params is None or request.request_id in self.requests:
            super().add_request(request)
            return
        params = SJDParams.from_extra_args(request.sampling_params.extra_args)
        runner_args = RunnerArgs(
            seed=noise_seed(request),
            window=params.window_of(self._config),
            is_adaptive=params.is_adaptive(self._config),
        )
        if not params.is_guided:
            prepare_request(request, runner_args)
            super().add_request(request)
            return
        companion = self.pairs.open(request, params, runner_args)
        super().add_request(request)
        super().add_request(companion)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step's work; a half whose partner was preempted is preempted first, and windows are cut to the load."""
        if self._clock is None:
            self._clock = time.perf_counter()
        self._preempt_split_pairs()
        self._cut_windows()
        # With num_spec_tokens > 0 the stock scheduler pads a new one-token prefill with placeholder drafts of -1.
        self.num_spec_tokens = 0
        try:
            output: SchedulerOutput = super().schedule(*args, **kwargs)
        finally:
            self.num_spec_tokens = self._max_num_drafts
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # how many drafts an asynchronous scheduler assumes for the next step; they are cut before it
        scheduler_output.num_spec_tokens_to_schedule = self._max_num_drafts
        super()._update_after_schedule(scheduler_output)
        scheduled = [self.requests[request_id] for request_id in scheduler_output.num_scheduled_tokens]
        self._steps[id(scheduler_output)] = _Step(
            scoring=[request for request in scheduled if not request.is_prefill_chunk],
            num_rows=len(scheduled),
            num_drafting=len(scheduler_output.scheduled_spec_decode_tokens),
            num_tokens=scheduler_output.total_num_scheduled_tokens,
        )

    def _observe_seconds(self, step: _Step) -> None:
        """Tell the controller how long a step took that has just ended, with all that came after the one before."""
        now = time.perf_counter()
        if self._clock is not None and step.num_tokens:
            self._windows.observe_step(step.num_rows, step.num_drafting, step.num_tokens, now - self._clock)
        self._clock = now if self.requests else None

    def _cut_windows(self) -> None:
        """Exact: under fixed noise a draft decides when a token comes, never which; the others have theirs by now."""
        adaptive: list[Request] = []
        others: list[Request] = []
        for request in self.running:
            runner_args = _runner_args(request)
            (adaptive if runner_args.is_adaptive else others).append(request)
            if len(request.spec_token_ids) > runner_args.window:
                request.spec_token_ids = request.spec_token_ids[: runner_args.window]
        window = self._windows.choose(
            num_rows=len(adaptive),
            num_pictures=sum(not self.pairs.is_companion(request.request_id) for request in adaptive),
            other_rows=len(others),
            other_drafting=sum(bool(request.spec_token_ids) for request in others),
            other_tokens=sum(1 + len(request.spec_token_ids) for request in others),
        )
        self._counters.put("window", window)
        for request in adaptive:
            length = min(window, self._useful_drafts(request))
            if len(request.spec_token_ids) > length:
                request.spec_token_ids = request.spec_token_ids[:length]

    def _useful_drafts(self, request: Request) -> int:
        """Drafts that could be accepted: none of a half that waits for the other, none after the last token."""
        partner = self.requests.get(self.pairs.partner(request.request_id) or "", request)
        if partner.status != RequestStatus.RUNNING or partner.is_prefill_chunk:
            return 0
        main = partner if self.pairs.is_companion(request.request_id) else request
        return max(main.max_tokens - main.num_output_tokens - 1, 0)

    def _preempt_split_pairs(self) -> None:
        # Not inside _preempt_request: schedule() holds the running list in locals while it preempts.
        # A half with a step in flight cannot be resumed at once, its other half can: it gets one step to follow.
        awaited, self._awaited = self._awaited, set()
        now = time.monotonic()
        for half in reversed(self.running.copy()):
            other = self.requests.get(self.pairs.partner(half.request_id) or "")
            if other is None or other.status != RequestStatus.PREEMPTED or other.request_id in awaited:
                continue
            self._awaited.add(half.request_id)
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
        step = self._steps.pop(id(scheduler_output))
        # what comes of a step for a request that was preempted after it was handed out changes no count
        scoring = [request for request in step.scoring if not request.num_stale_output_tokens]
        num_tokens_before = {request.request_id: request.num_tokens for request in scoring}
        self._observe_lone_tokens(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._observe_drafts(scoring, scheduler_output.scheduled_spec_decode_tokens, num_tokens_before)
        held = [
            request
            for request in scoring
            if self.requests.get(request.request_id) is request
            and request.status == RequestStatus.RUNNING
            and request.num_tokens == num_tokens_before[request.request_id]
        ]
        self._fail_stalled({request.request_id for request in held})
        self._counters.add("steps_total")
        self._counters.add("guidance_stalls_total", len(held))
        self._counters.put("guidance_pairs", len(self.pairs))
        for request in held:
            self._roll_back(request, scheduler_output.scheduled_spec_decode_tokens.get(request.request_id, ()))
        self._finish_lone_companions()
        for output in outputs.values():
            output.outputs = [o for o in output.outputs if not self.pairs.is_companion(o.request_id)]
            if output.finished_requests:
                output.finished_requests = {i for i in output.finished_requests if not self.pairs.is_companion(i)}
        self._observe_seconds(step)
        return outputs

    def _roll_back(self, request: Request, drafts: Sequence[int]) -> None:
        """All that the step scored of a request is computed again: its last token and the drafts."""
        num_scored = 1 + len(drafts)
        request.num_computed_tokens -= num_scored
        if request.num_output_placeholders:
            # a later step has been handed out already, on the same assumption, and is rolled back likewise
            request.num_output_placeholders -= num_scored
        else:
            request.spec_token_ids = []

    def _observe_lone_tokens(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> None:
        """Count forwards without drafts in the requests' metrics too, where stock code has those with drafts alone."""
        for request_id, index in model_runner_output.req_id_to_index.items():
            metrics = self.requests[request_id].spec_decode_metrics if request_id in self.requests else None
            has_drafts = request_id in scheduler_output.scheduled_spec_decode_tokens
            if metrics is not None and not has_drafts and model_runner_output.sampled_token_ids[index]:
                metrics.observe(0, 0, detailed=self.spec_decode_metrics_level == "detailed")

    def _observe_drafts(
        self, scoring: list[Request], drafts_of: dict[str, list[int]], num_tokens_before: dict[str, int]
    ) -> None:
        """Tell controller and counters what became of the drafts; companions have the drafts of their mains."""
        self._refused = {}
        settled: list[tuple[int, int]] = []
        others: list[tuple[int, int]] = []
        for request in scoring:
            request_id = request.request_id
            if self.pairs.is_companion(request_id):
                continue
            drafts = drafts_of.get(request_id)
            num_before = num_tokens_before[request_id]
            num_emitted = request.num_tokens - num_before
            began = self._drafting_from.pop(request_id, num_before)
            if drafts and not request.is_finished():
                self._drafting_from[request_id] = began
            if not drafts or not num_emitted:
                continue
            if _runner_args(request).is_adaptive:
                # all of the window's drafts came in at its end since then
                is_settled = num_before - began >= len(drafts)
                (settled if is_settled else others).append((len(drafts), num_emitted - 1))
            self._counters.add("drafts_scored_total", len(drafts))
            self._counters.add("drafts_accepted_total", num_emitted - 1)
            if drafts[0] >= 0:  # the V1 runner's; those of V2 never leave the device
                self._refused[request_id] = drafts[num_emitted:]
        self._windows.observe_acceptance(settled, others)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the next windows, and count which of the old drafts stand in them."""
        super().update_draft_token_ids(draft_token_ids)
        for request_id, refused in self._refused.items():
            request = self.requests.get(request_id)
            if request is not None:
                pairs = list(zip(refused, request.spec_token_ids, strict=False))
                self._counters.add("drafts_refreshed_total", len(pairs))
                self._counters.add("drafts_kept_total", sum(old == new for old, new in pairs))

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
            self._drafting_from.pop(request.request_id, None)
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


class SJDScheduler(SJDSchedulerMixin, Scheduler):
    """Hands out a step when the one before has ended."""


class SJDAsyncScheduler(SJDSchedulerMixin, AsyncScheduler):
    """Hands out a step while the one before is computed; for Model Runner V2."""
