"""The parts that need an engine, in their small form: one engine of the small shape for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.anatomy import PARTS
from benchmarks.gpu.common import RUNNER_SWITCH, Run, fill_weights, runner_name, runner_of
from benchmarks.gpu.latency import measure as measure_latency
from benchmarks.gpu.memory import measure as measure_memory
from benchmarks.gpu.replay import Replay, replay_of, replay_on
from benchmarks.gpu.steps import measure as measure_steps
from benchmarks.gpu.steps import partly_given
from benchmarks.gpu.traces import Traces
from sjd_vllm import ImagePipeline
from sjd_vllm.images.request import ImageRequest

WINDOW, BATCH = 16, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("gpu")
    return Run(is_small=True, output=folder / "rows", work=folder / "work")


@pytest.fixture(scope="module")
def pipeline(run: Run) -> Iterator[ImagePipeline]:
    with ImagePipeline(num_speculative_tokens=WINDOW, max_batch_size=BATCH, **run.engine_args()) as started:
        started.start()
        fill_weights(llm_of(started))
        yield started


def engine_of(pipeline: Any) -> Any:
    return pipeline._engine


def llm_of(pipeline: Any) -> Any:
    return pipeline._engine._llm


def decode(pipeline: Any, seeds: list[int], window: int | None) -> list[list[int]]:
    """Tokens of each forward, by picture."""
    requests = [ImageRequest("a red house", seed=seed, num_speculative_tokens=window) for seed in seeds]
    return [picture.tokens_per_step for picture in pipeline._engine.decode(pipeline.plan(requests))]


def expected(run: Run, seed: int, window: int) -> list[int]:
    """The trace of a request, cut where a picture of this shape ends."""
    traces, left, steps = Traces.load(), run.shape.num_tokens, []
    for count in traces.steps[window][seed % traces.num_pictures]:
        steps.append(min(count, left))
        left -= steps[-1]
        if not left:
            return steps
    raise AssertionError("the demo's pictures are longer than the small shape's")


@pytest.mark.parametrize("window", [4, 16])
def test_the_engine_decodes_at_the_traces_pace(run: Run, pipeline: ImagePipeline, window: int) -> None:
    llm = llm_of(pipeline)
    seeds = [0, 1, 2, 70, 71]  # more than go at once
    before = decode(pipeline, seeds, window)
    with replay_on(runner_of(llm), replay_of(run, runner_of(llm), window)):
        paced = decode(pipeline, seeds, window)
    # the last step of a picture may be shorter than its trace's
    assert paced == [expected(run, seed, window) for seed in seeds]
    assert decode(pipeline, seeds, window) == before != paced  # and by itself again afterwards


def test_tokens_stay_legal_under_the_replay(run: Run, pipeline: ImagePipeline) -> None:
    llm = llm_of(pipeline)
    pictures = pipeline.plan([ImageRequest("a red house", seed=3)])
    with replay_on(runner_of(llm), replay_of(run, runner_of(llm), WINDOW)):
        (decoded,) = engine_of(pipeline).decode(pictures)
    assert len(decoded.token_ids) == run.shape.num_tokens
    assert pipeline.family.grammar(pictures[0].size).codes(decoded.token_ids).shape == (run.shape.grid, run.shape.grid)


def test_a_runner_without_a_seam_is_refused(run: Run) -> None:
    replay = Replay(Traces.load(), run.shape.num_tokens, WINDOW)
    with pytest.raises(TypeError, match="no seam"), replay_on(object(), replay):
        pass


@pytest.mark.parametrize("window", [0, WINDOW])
def test_steps(run: Run, pipeline: ImagePipeline, window: int) -> None:
    llm = llm_of(pipeline)
    traces = Traces.load()
    with replay_on(runner_of(llm), replay_of(run, runner_of(llm), window)):
        pace = traces.tokens_per_forward(window)
        figures: Any = measure_steps(pipeline, 2, window, pace, run.device, num_warm_up=1, num_counted=5)
    assert figures["steps"] == 5
    on_device = sum(float(figures[f"device_{part}_ms"]) for part in PARTS)
    mean = float(figures["step_ms_mean"])
    assert 0 < float(figures["device_forward_ms"]) < on_device
    assert 0 < float(figures["outside_forward_share"]) < 1
    # the parts are all of a step but what the loop around it takes, which is little unless others take the cores
    assert 0.2 * mean < on_device < 2 * mean
    asked = os.environ.get(RUNNER_SWITCH)
    expected = {"1": ("V2 SJD",), "0": ("V1 SJD",)}.get(asked or "", ("V1 SJD", "V2 SJD"))
    assert runner_name(llm).startswith(expected)
    scheduler = llm.engine_core.engine_core.scheduler
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.usage == 0


def test_steps_that_a_picture_does_not_last(run: Run, pipeline: ImagePipeline) -> None:
    with pytest.raises(RuntimeError, match="a picture ended within 500 steps"):
        measure_steps(pipeline, 1, WINDOW, 1.0, run.device, num_warm_up=1, num_counted=500)


def test_pictures_that_are_partly_given_differ(pipeline: ImagePipeline) -> None:
    pictures = partly_given(pipeline, 3, None, 5)
    grammar = pipeline.family.grammar(pictures[0].size)
    given = [picture.given_token_ids for picture in pictures]
    assert len({tuple(tokens) for tokens in given}) == 3
    for picture in pictures:
        assert grammar.codes(picture.given_token_ids).shape[0] == 5
        assert picture.sjd.negative_prompt_token_ids[-45:] == tuple(picture.given_token_ids)


def test_memory(pipeline: ImagePipeline) -> None:
    one: Any
    two: Any
    one, two = (measure_memory(pipeline, count) for count in (1, 2))
    assert (one["sequences_at_once"], two["sequences_at_once"]) == (2, 4)
    assert two["kv_used_gb"] == pytest.approx(2 * float(one["kv_used_gb"]), rel=0.01)
    assert float(one["kv_used_gb"]) >= float(one["kv_check_gb"]) > 0
    assert int(one["pictures_that_fit"]) >= BATCH


def test_latency(run: Run, pipeline: ImagePipeline) -> None:
    from benchmarks.contestants import Turn

    llm = llm_of(pipeline)
    asked: list[tuple[str, int, int]] = []

    def turn(method: str, seeds: list[int], concurrency: int) -> Turn:
        asked.append((method, len(seeds), concurrency))
        counts = decode(pipeline, seeds, 0 if method == "none" else None)
        return Turn([1.0] * len(seeds), 2.0, [len(steps) for steps in counts])

    figures = measure_latency(llm, turn, 3, is_sjd=False)
    assert asked == [("none", 6, 3)]
    assert figures == {
        "num_pictures": 6,
        "forwards_mean": float(run.shape.num_tokens),
        **{f"latency_{name}": 1.0 for name in ("p20", "p50", "p80")},
        "pictures_per_minute": 180.0,
        "preemptions": 0,
    }


def test_pixels(run: Run, tmp_path: Path) -> None:
    """A decoder of the small shape, PyTorch's attention against itself, and xformers refused where it cannot run."""
    import torch

    from benchmarks.gpu import pixels

    shape = pixels.decoder_shape(run)
    call = pixels.decoder_call(pixels.random_decoder(shape, run.device), shape, run.shape.grid, 1, run.device)
    picture = call(torch.float32)
    assert picture.shape == (1, 3, run.shape.side, run.shape.side)
    figures: Any = pixels.measure(call, "torch", torch.float32, picture, run, 2)
    assert (figures["largest_difference"], figures["refused"]) == (0.0, "")
    assert float(figures["ms_p50"]) > 0
    if run.device.type == "cpu":
        assert pixels.measure(call, "xformers", torch.float32, picture, run, 2)["refused"]
