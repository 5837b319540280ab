"""Latency and throughput of whole pictures on the 7B shape: stock vLLM, plain decoding, SJD at the demo's acceptance.

`stock` is vLLM without this plugin and has two unguided sequences a picture; `plain` is this engine with guidance,
built for window 0; `sjd` is this engine as it comes, with windows by load, at the pace of the demo's traces (`replay`).
One engine in one process each, one after the other: three models of 7B with their keys and values do not fit beside
each other, and a GPU that nobody else uses does not change with time as a shared CPU does.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks.contestants import ours, stock
from benchmarks.gpu.common import Run, fill_weights, parser, runner_name, runner_of
from benchmarks.gpu.replay import replay_of, replay_on
from sjd_vllm.config import ConfigError, SJDConfig, check_choice, check_int
from sjd_vllm.images.bench import percentiles
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import int_list
from sjd_vllm.images.rows import rounded

CONTESTANTS = ("stock", "plain", "sjd")
CONCURRENCIES = [1, 16, 64]
# Pictures of a cell: so many times the concurrency, and at least so many.
_TURNS, _FEWEST = 2, 4


def main() -> None:
    """One contestant; a row a concurrency."""
    made = parser(__doc__)
    made.add_argument("--contestant", required=True, help=f"one of {', '.join(CONTESTANTS)}")
    made.add_argument("--concurrency", type=int_list, default=CONCURRENCIES, help="pictures at once (1,16,64)")
    args = made.parse_args()
    check_choice("contestant", args.contestant, CONTESTANTS)
    for concurrency in args.concurrency:
        check_int("concurrency", concurrency, 1, 1024)
    run = Run.from_flags(args)
    rows = run.rows("latency", "shape", "contestant", "concurrency")
    cells = [{"shape": run.shape.name, "contestant": args.contestant, "concurrency": n} for n in args.concurrency]
    cells = [cell for cell in cells if not rows.has(**cell)]
    if not cells:
        return
    prepare_environment(is_quiet=True)
    window = SJDConfig().num_speculative_tokens if args.contestant == "sjd" else 0
    start = stock if args.contestant == "stock" else ours
    llm, decode = start(max(args.concurrency), window, **run.engine_args())
    fill_weights(llm)
    is_replayed = args.contestant == "sjd"
    runner = runner_of(llm)
    replay = replay_on(runner, replay_of(run, runner, window)) if is_replayed else nullcontext()
    with replay:
        decode("sjd" if is_replayed else "none", [0], 1)  # the first forwards of a process are slow
        for cell in cells:
            figures = measure(llm, decode, cell["concurrency"], is_replayed)
            rows.append({**cell, "window": window, "model_runner": runner_name(llm), **figures})


def measure(llm: Any, decode: Any, concurrency: int, is_sjd: bool) -> dict[str, object]:
    """Decode pictures, so many at once."""
    seeds = list(range(max(_TURNS * concurrency, _FEWEST)))
    with preemptions_of(llm) as preempted:
        turn = decode("sjd" if is_sjd else "none", seeds, concurrency)
    return {
        "num_pictures": len(turn.latencies),
        "forwards_mean": rounded(statistics.fmean(turn.forwards)),
        **{f"latency_{name}": rounded(value) for name, value in percentiles(turn.latencies).items()},
        "pictures_per_minute": rounded(60 * len(turn.latencies) / turn.seconds),
        "preemptions": len(preempted),
    }


@contextmanager
def preemptions_of(llm: Any) -> Iterator[list[str]]:
    """A list that grows by the id of every sequence that the engine preempts, because its memory is full."""
    scheduler = llm.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    preempted: list[str] = []

    def recorded(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = recorded
    try:
        yield preempted
    finally:
        del scheduler._preempt_request


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"latency.py: error: {error}")
