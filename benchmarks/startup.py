"""Seconds from the start of a process to its first token: stock vLLM and ours on the same model, taking turns."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from contestants import ENGINES, Contestant

from sjd_vllm.config import ConfigError, SJDConfig
from sjd_vllm.images.bench import percentiles
from sjd_vllm.images.flags import Parser
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded

RESULTS = Path(__file__).parent / "results" / "startup.csv"


def main() -> None:
    """Start both engines, again and again."""
    args = _parse_args()
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for turn in range(-1, args.starts):
        for engine in ENGINES if turn % 2 else ENGINES[::-1]:
            contestant = Contestant(engine, args.batch_size, SJDConfig().num_speculative_tokens)
            if turn >= 0:  # the first start of each is a warm-up: files are read from the disk, sources compiled
                seconds[engine].append(contestant.start_seconds)
            contestant.close()
    for engine in ENGINES:
        figures = {f"seconds_{name}": rounded(value) for name, value in percentiles(seconds[engine]).items()}
        row = {**provenance(), "engine": engine, "starts": args.starts, "max_batch_size": args.batch_size, **figures}
        append_rows(args.output, [row])
        print(f"{engine:>6}: {figures}")


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--starts", type=int, default=5, help="of each engine (5)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at once (8)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    args: argparse.Namespace = parser.parse_args()
    return args


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"startup.py: error: {error}")
