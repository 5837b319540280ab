"""Where a step's time goes: milliseconds and shares by part, by batch and window, on the demo model or another one.

The parts are methods of the running engine, timed from outside by wrapping them on the live objects; a part's time is
what it takes without the parts inside it. One engine in one process; the last column is what a second engine, in a
process of its own as servers have it, takes more for a step: the messages between the two.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sjd_vllm.config import ConfigError
from sjd_vllm.demo.captions import captions
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import Parser, int_list
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded

RESULTS = Path(__file__).parent / "results" / "anatomy.csv"
PARTS = ("forward", "choices", "sweep", "windows", "inputs", "outputs", "scheduler", "front_end")
# ours and not the model's: what plain vLLM would call sampling
OURS = ("choices", "sweep", "windows")


class Stopwatch:
    """Seconds by part; a part that runs inside another one is taken out of the outer one's time."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[part] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return wrapper


def places_of(llm_engine: Any) -> list[tuple[Any, str, str]]:
    """Owner, method and part of what is timed in a live in-process engine, with either of vLLM's model runners."""
    from sjd_vllm.engine import fixed_noise_pool

    core = llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    places = [
        (llm_engine, "step", "front_end"),
        (core, "step_fn", "scheduler"),
        (runner, "execute_model", "inputs"),
        (runner, "sample_tokens", "outputs"),
        (runner.model, "compute_logits", "forward"),
    ]
    if hasattr(runner, "_model_forward"):  # V1
        return [
            *places,
            (runner, "_model_forward", "forward"),
            (runner, "_sample", "windows"),
            (fixed_noise_pool.FixedNoisePool, "_choices", "choices"),
            (fixed_noise_pool, "sweep_cpu", "sweep"),
        ]
    from sjd_vllm.engine import device_states

    # V2 calls the model itself, or has it inside a CUDA graph
    graphs = getattr(runner, "cudagraph_manager", None)
    replays = [(graphs, name, "forward") for name in ("run_fullgraph", "run_pw_graph") if hasattr(graphs, name)]
    return [
        *places,
        *replays,
        (runner.model, "forward", "forward"),
        (runner, "sample", "windows"),
        (runner._sjd, "fill_inputs", "windows"),
        (runner._sjd, "_choices", "choices"),
        (device_states, "sweep", "sweep"),
    ]


@contextmanager
def stopwatch_on(llm_engine: Any, watch: Stopwatch | None = None) -> Iterator[Stopwatch]:
    """Wrap the parts of a live in-process engine."""
    watch = watch or Stopwatch()
    places = places_of(llm_engine)
    originals = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    try:
        yield watch
    finally:
        for owner, name, original in originals:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def main() -> None:
    """Measure every batch and window, interleaved over the rounds."""
    args = _parse_args()
    prepare_environment(is_quiet=True)
    from sjd_vllm.images.pipeline import ImagePipeline

    if args.child:
        _time_steps(args)
        return
    cells = [(batch, window) for batch in args.batches for window in args.windows]
    seconds: dict[tuple[int, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    tokens: dict[tuple[int, int], float] = {}
    prompts = captions(max(args.batches), args.seed)
    with ImagePipeline(
        args.model, num_speculative_tokens=max(args.windows), max_batch_size=max(args.batches)
    ) as pipeline:
        pipeline.start()
        assert pipeline._engine is not None
        pipeline.generate(prompts[:1], seed=0)
        for _ in range(args.rounds):
            for batch, window in cells:
                with stopwatch_on(pipeline._engine._llm) as watch:
                    result = pipeline.generate(prompts[:batch], seed=list(range(batch)), num_speculative_tokens=window)
                steps = max(picture.num_steps for picture in result.pictures)
                seconds[batch, window].append({part: 1000 * s / steps for part, s in watch.seconds.items()})
                tokens[batch, window] = result.num_tokens / result.num_steps
    for batch, window in cells:
        own = seconds[batch, window]
        # the round with the median sum: the parts of one row belong together
        median = sorted(own, key=lambda parts: sum(parts.values()))[len(own) // 2]
        total = sum(median.values())
        row = {
            **provenance(),
            "model": pipeline.model.name,
            "batch": batch,
            "window": window,
            "rounds": args.rounds,
            "tokens_per_forward": rounded(tokens[batch, window]),
            "step_ms": rounded(total),
            **{f"{part}_ms": rounded(median[part]) for part in PARTS},
            "ours_share": rounded(sum(median[part] for part in OURS) / total),
            "ipc_ms": rounded(_step_ms(args, batch, window, "1") - _step_ms(args, batch, window, "0")),
        }
        append_rows(args.output, [row])
        parts = "  ".join(f"{part} {median[part]:.2f}" for part in PARTS)
        print(f"batch {batch:>2} window {window:>2}: {total:6.2f} ms  {parts}  ours {100 * row['ours_share']:.0f} %")


def _step_ms(args: argparse.Namespace, batch: int, window: int, multiprocessing: str) -> float:
    """Milliseconds a step of an engine started anew, in this process or in its own."""
    command = [sys.executable, __file__, "--child", multiprocessing, "--batches", str(batch), "--windows", str(window)]
    command += ["--rounds", str(args.rounds), "--seed", str(args.seed)] + (
        ["--model", args.model] if args.model else []
    )
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _time_steps(args: argparse.Namespace) -> None:
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = args.child
    from sjd_vllm.images.pipeline import ImagePipeline

    (batch,), (window,) = args.batches, args.windows
    with ImagePipeline(args.model, num_speculative_tokens=max(window, 1), max_batch_size=batch) as pipeline:
        prompts = captions(batch, args.seed)
        pipeline.generate(prompts[:1], seed=0)
        figures = []
        for _ in range(args.rounds):
            result = pipeline.generate(prompts, seed=list(range(batch)), num_speculative_tokens=window)
            figures.append(1000 * result.seconds / max(picture.num_steps for picture in result.pictures))
    print(sorted(figures)[len(figures) // 2])


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", help="checkpoint (the demo model if absent)")
    parser.add_argument("--batches", type=int_list, default=[1, 8], help="pictures at once, comma-separated (1,8)")
    parser.add_argument("--windows", type=int_list, default=[0, 16, 32, 64], help="comma-separated (0,16,32,64)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each cell is measured (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the captions (0)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    parser.add_argument("--child", metavar="0|1", help=argparse.SUPPRESS)
    args: argparse.Namespace = parser.parse_args()
    return args


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"anatomy.py: error: {error}")
