"""Time and anatomy of a step with one window, by pictures at once, on the 7B shape with guidance.

Rows of each picture are given with its prompt, as many as make the counted steps lie around its middle, where keys and
values are as many as they are on average. Pictures advance at the pace of the demo's traces (`replay`), which changes
no forward; the first steps, prompts and all, are not counted. One engine a window, whose longest window this is, so
that the step at window 0 is that of an engine that was built for plain decoding.
"""

from __future__ import annotations

import dataclasses
import sys
from itertools import pairwise
from typing import Any

import torch

from benchmarks.anatomy import PARTS, stopwatch_on
from benchmarks.gpu.common import Run, fill_weights, parser, runner_name, runner_of
from benchmarks.gpu.device_clock import DeviceStopwatch
from benchmarks.gpu.replay import replay_of, replay_on
from benchmarks.gpu.traces import Traces
from sjd_vllm.config import ConfigError, check_int, check_window
from sjd_vllm.demo.captions import captions
from sjd_vllm.images.bench import percentiles
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import int_list
from sjd_vllm.images.rows import rounded

BATCHES = [1, 4, 16, 64]
# Steps after all prompts are computed: those that are not counted, and those that are.
_WARM_UP, _COUNTED = 16, 64
_SMALL = {"num_warm_up": 1, "num_counted": 4}
# Parts of the model's own forward; the head that turns states into logits is among them.
_FORWARD = ("forward",)


def main() -> None:
    """One window; a row a batch."""
    made = parser(__doc__)
    made.add_argument("--window", type=int, required=True, help="draft tokens")
    made.add_argument("--batches", type=int_list, default=BATCHES, help="pictures at once (1,4,16,64)")
    args = made.parse_args()
    check_window("window", args.window)
    for batch in args.batches:
        check_int("batches", batch, 1, 1024)
    run = Run.from_flags(args)
    rows = run.rows("steps", "shape", "window", "batch")
    batches = [batch for batch in args.batches if not rows.has(shape=run.shape.name, window=args.window, batch=batch)]
    if not batches:
        return
    prepare_environment(is_quiet=True)
    from sjd_vllm.images.pipeline import ImagePipeline

    with ImagePipeline(
        num_speculative_tokens=args.window, max_batch_size=max(args.batches), **run.engine_args()
    ) as pipeline:
        pipeline.start()
        llm_engine = pipeline._engine._llm  # type: ignore[union-attr]
        fill_weights(llm_engine)
        traces = Traces.load()
        runner = runner_of(llm_engine)
        with replay_on(runner, replay_of(run, runner, args.window)):
            for batch in batches:
                cell = {"shape": run.shape.name, "window": args.window, "batch": batch}
                pace = traces.tokens_per_forward(args.window)
                figures = measure(pipeline, batch, args.window, pace, run.device, **(_SMALL if run.is_small else {}))
                rows.append({**cell, "model_runner": runner_name(llm_engine), **figures})


def measure(
    pipeline: Any,
    batch: int,
    window: int,
    pace: float,
    device: torch.device,
    *,
    num_warm_up: int = _WARM_UP,
    num_counted: int = _COUNTED,
) -> dict[str, object]:
    """Run so many pictures until enough steps are counted, and drop them.

    pace: tokens that a picture gets in a step.

    Raises RuntimeError if the pictures end, or do not all fit into the engine, before that.
    """
    engine = pipeline._engine
    llm = engine._llm
    grammar = pipeline.family.grammar(pipeline.family.sizes[0])
    before_middle = (grammar.num_tokens - pace * (num_warm_up + num_counted)) / 2
    rows_given = max(0, round(before_middle / grammar.row_stride))
    waiting = {engine._submit(picture) for picture in partly_given(pipeline, batch, window, rows_given)}
    names = list(waiting)
    try:
        while waiting:
            waiting -= {output.request_id for output in llm.step()}
        for _ in range(num_warm_up):
            llm.step()
        scheduler = llm.engine_core.engine_core.scheduler
        num_running = len(scheduler.running)
        watch = DeviceStopwatch(device)
        with stopwatch_on(llm, watch):
            while len(watch.step_starts) <= num_counted:
                if any(output.finished for output in llm.step()):
                    raise RuntimeError(f"a picture ended within {num_counted} steps of window {window}")
        if len(scheduler.running) != num_running:
            raise RuntimeError(f"{batch} pictures do not fit into the engine's memory at once")
        return _figures(watch)
    finally:
        drop(llm, names)


def drop(llm: Any, names: list[str]) -> None:
    """Abort requests, and let the runner hear of it, which it does with the next step; one more may be under way."""
    llm.abort_request(names)
    for _ in range(3):
        llm.step()


def _figures(watch: DeviceStopwatch) -> dict[str, object]:
    periods = [1000 * (after - before) for before, after in pairwise(watch.step_starts)]
    num_steps = len(watch.step_starts)
    device = {part: 1000 * seconds / num_steps for part, seconds in watch.device_seconds().items()}
    host = {part: 1000 * seconds / num_steps for part, seconds in watch.seconds.items()}
    mean = sum(periods) / len(periods)
    forward = sum(device[part] for part in _FORWARD)
    return {
        "steps": len(periods),
        "step_ms_mean": rounded(mean),
        **{f"step_ms_{name}": rounded(value) for name, value in percentiles(periods).items()},
        "outside_forward_share": rounded(1 - forward / mean),
        **{f"device_{part}_ms": rounded(device[part]) for part in PARTS},
        **{f"host_{part}_ms": rounded(host[part]) for part in PARTS},
    }


def partly_given(pipeline: Any, count: int, window: int | None, rows_given: int) -> list[Any]:
    """Guided pictures whose first rows of codes are given, all different, so that none shares another's KV blocks.

    window: of each; None leaves it to the engine.
    """
    from sjd_vllm.images.request import ImageRequest

    requests = [
        ImageRequest(prompt, seed=seed, num_speculative_tokens=window) for seed, prompt in enumerate(captions(count, 0))
    ]
    return [_with_given(pipeline.family, picture, rows_given) for picture in pipeline.plan(requests)]


def _with_given(family: Any, picture: Any, rows_given: int) -> Any:
    grammar = family.grammar(picture.size)
    num_given = rows_given * grammar.row_stride
    draws = torch.Generator().manual_seed(picture.seed)
    given = []
    for index in grammar.set_of_position[:num_given].tolist():
        legal = grammar.token_ids[grammar.legal_sets[index]]
        given.append(int(legal[int(torch.randint(len(legal), (1,), generator=draws))]))
    sjd = dataclasses.replace(
        picture.sjd,
        negative_prompt_token_ids=(*picture.sjd.negative_prompt_token_ids, *given),
        num_given_tokens=num_given,
    )
    return dataclasses.replace(picture, given_token_ids=given, sjd=sjd)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"steps.py: error: {error}")
