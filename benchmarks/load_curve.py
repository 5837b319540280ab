"""Latency and throughput by load: stock vLLM, plain decoding with guidance, and SJD, taking turns in one run.

At each concurrency the three decode the same captions in turns, so that all see the same machine. SJD's window follows
the load. Rows go to results/load_curve.csv, and the curve to results/load_curve.svg.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from contestants import Contestant, Turn

from sjd_vllm.config import ConfigError, SJDConfig
from sjd_vllm.images.bench import percentiles
from sjd_vllm.images.flags import Parser, int_list
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded

RESULTS = Path(__file__).parent / "results" / "load_curve.csv"
METHODS = ("stock", "plain", "sjd")


def main() -> None:
    """Measure, append rows, draw."""
    args = _parse_args()
    largest = max(args.concurrency)
    engines = {name: Contestant(name, largest, args.window) for name in ("stock", "ours")}
    rows: list[dict[str, Any]] = []
    taken_on = provenance()
    for concurrency in sorted(args.concurrency):
        turns: dict[str, list[Turn]] = {method: [] for method in METHODS}
        # long turns, as pictures come and go under load, and do not begin and end together
        size = max(3 * concurrency, 4)
        for turn in range(args.turns):
            seeds = list(range(turn * size, (turn + 1) * size))
            for method in METHODS[turn % 3 :] + METHODS[: turn % 3]:
                engine = engines["stock" if method == "stock" else "ours"]
                turns[method].append(engine.decode("sjd" if method == "sjd" else "none", seeds, concurrency))
        rates = {method: _rate(turns[method]) for method in METHODS}
        for method in METHODS:
            latencies = [latency for turn in turns[method] for latency in turn.latencies]
            forwards = [count for turn in turns[method] for count in turn.forwards]
            rows.append(
                {
                    **taken_on,
                    "window": args.window if method == "sjd" else 0,
                    "concurrency": concurrency,
                    "method": method,
                    "num_pictures": len(latencies),
                    "forwards_mean": rounded(statistics.fmean(forwards)),
                    **{f"latency_{name}": rounded(value) for name, value in percentiles(latencies).items()},
                    "pictures_per_minute": rounded(rates[method]),
                    "rate_over_plain": rounded(rates[method] / rates["plain"]),
                }
            )
            print({key: rows[-1][key] for key in list(rows[-1])[4:]}, flush=True)
    for engine in engines.values():
        engine.close()
    append_rows(args.output, rows)
    _draw(rows, args.output.with_suffix(".svg"))


def _rate(turns: list[Turn]) -> float:
    return 60 * sum(len(turn.latencies) for turn in turns) / sum(turn.seconds for turn in turns)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        concurrency = [row["concurrency"] for row in own]
        left.plot(
            [row["pictures_per_minute"] for row in own], [row["latency_p50"] for row in own], marker="o", label=method
        )
        right.plot(concurrency, [row["rate_over_plain"] for row in own], marker="o", label=method)
    left.set(xlabel="pictures a minute", ylabel="seconds a picture, median", yscale="log")
    right.set(xlabel="pictures at once", ylabel="pictures a minute, over plain decoding", ylim=(0, None))
    right.set_xscale("log", base=2)
    right.axhline(1, color="grey", linewidth=0.8)
    left.legend()
    figure.savefig(path)


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--concurrency", type=int_list, default=[1, 2, 4, 8, 16, 32, 64], help="pictures at once")
    parser.add_argument("--turns", type=int, default=3, help="of each method, with three pictures for each at once (3)")
    parser.add_argument("--window", type=int, default=SJDConfig().num_speculative_tokens, help="the longest window")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    args: argparse.Namespace = parser.parse_args()
    return args


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"load_curve.py: error: {error}")
