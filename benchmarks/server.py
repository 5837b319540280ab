"""Latency and throughput over HTTP: plain decoding against SJD, by clients at once, on servers with some flags.

Each turn starts every server once, one after the other; on each, the two methods take turns on the same captions and
seeds. A client asks for one picture after another.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from live import LiveServer, live_server

from sjd_vllm.config import ConfigError
from sjd_vllm.demo.captions import captions
from sjd_vllm.images.bench import percentiles
from sjd_vllm.images.flags import Parser, int_list
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded

RESULTS = Path(__file__).parent / "results" / "server.csv"
METHODS = {"plain": {"method": "none"}, "sjd": {}}
Cell = tuple[str, int, str]  # flags of vllm serve, clients at once, method


def main() -> None:
    """Measure every cell, turn by turn."""
    args = _parse_args()
    latencies: dict[Cell, list[float]] = defaultdict(list)
    seconds: dict[Cell, float] = defaultdict(float)
    cpu_seconds: dict[Cell, float] = defaultdict(float)
    servers = ["", *args.vllm_flags]
    for turn in range(args.turns):
        for flags in servers if turn % 2 else servers[::-1]:
            with (
                tempfile.TemporaryDirectory() as folder,
                live_server(
                    ["--max-batch-size", str(max(args.concurrency)), "--", *flags.split()], Path(folder, "log")
                ) as up,
            ):
                for method in METHODS:  # both have been compiled and measured their steps before the clock runs
                    _load(up, max(args.concurrency), 1, method, turn)
                for clients, method in itertools.product(args.concurrency, list(METHODS)[:: 1 if turn % 2 else -1]):
                    cell = flags, clients, method
                    cpu, start = _cpu_seconds(up), time.perf_counter()
                    latencies[cell] += _load(up, clients, args.pictures, method, turn)
                    seconds[cell] += time.perf_counter() - start
                    cpu_seconds[cell] += _cpu_seconds(up) - cpu
    for cell, own in latencies.items():
        flags, clients, method = cell
        row = {
            **provenance(),
            "vllm_flags": flags,
            "clients": clients,
            "method": method,
            "pictures": len(own),
            **{f"seconds_{name}": rounded(value) for name, value in percentiles(own).items()},
            "pictures_per_minute": rounded(60 * len(own) / seconds[cell]),
            "cpu_seconds_per_picture": rounded(cpu_seconds[cell] / len(own)),
        }
        append_rows(args.output, [row])
        print({name: row[name] for name in list(row)[-9:]})


def _load(server: LiveServer, clients: int, pictures: int, method: str, turn: int) -> list[float]:
    """Seconds of each answer, of so many clients that ask for so many pictures each."""

    def client(number: int) -> list[float]:
        prompts = captions(pictures, 1000 * turn + number)
        with httpx.Client(base_url=server.url, timeout=600) as http:
            return [_ask(http, prompt, method, 100 * number + index) for index, prompt in enumerate(prompts)]

    with ThreadPoolExecutor(clients) as pool:
        return [seconds for own in pool.map(client, range(clients)) for seconds in own]


def _ask(http: httpx.Client, prompt: str, method: str, seed: int) -> float:
    start = time.perf_counter()
    answer = http.post("/v1/images/generations", json={"prompt": prompt, "seed": seed, "sjd": METHODS[method]})
    answer.raise_for_status()
    return time.perf_counter() - start


def _cpu_seconds(server: LiveServer) -> float:
    """Of all its processes."""
    times = [psutil.Process(pid).cpu_times() for pid in server.pids()]
    return sum(one.user + one.system for one in times)


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--concurrency", type=int_list, default=[1, 2, 4, 8, 16], help="clients at once (1,2,4,8,16)")
    parser.add_argument("--pictures", type=int, default=3, help="that each client asks for in a turn (3)")
    parser.add_argument("--turns", type=int, default=3, help="times that every server is started (3)")
    parser.add_argument(
        "--vllm-flags", action="append", default=[], metavar="FLAGS", help="one more server, with these; repeatable"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    args: argparse.Namespace = parser.parse_args()
    return args


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"server.py: error: {error}")
