"""Many clients at once on `sjd-vllm serve`: mixed n, sizes, streams, file formats and aborts, for minutes.

Promises, each checked; the exit code is 1 if one is broken: no error but the overload answer (429 with Retry-After);
every picture equals the one that its seed gives alone, afterwards, on the same server; memory is flat after the
warm-up; and at the end no request and no KV block is left. A row goes to results/load_server.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from live import LiveServer, live_server

from sjd_vllm.demo.captions import captions
from sjd_vllm.images.flags import Parser
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded

RESULTS = Path(__file__).parent / "results" / "load_server.csv"
ROUTE = "/v1/images/generations"
ABORT_SHARE = 0.1  # of all requests
STREAM_SHARE = 0.3
SAMPLE_SECONDS = 2
SECONDS_TO_JUDGE_MEMORY = 300  # a shorter run is warm-up
FLAT_BYTES_PER_PICTURE = 10_000  # of growth after the warm-up; a leaked file of the demo model would be twice that


@dataclass
class Record:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)  # of each body with n = 1, as JSON, its file in base64
    latencies: list[float] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, pictures so far, bytes


class Client:
    """One user, who asks for pictures one after another."""

    def __init__(
        self, http: httpx.AsyncClient, record: Record, seed: int, sizes: list[str], prompts: list[str]
    ) -> None:
        self._http = http
        self._record = record
        self._random = random.Random(seed)
        self._sizes = sizes
        self._next_seed = seed * 1_000_000
        self._prompts = prompts

    async def run(self, until: float) -> None:
        """Ask until the time is over; what has begun is finished."""
        while time.monotonic() < until:
            body = self._body()
            try:
                if self._random.random() < ABORT_SHARE:
                    await self._abort(body)
                else:
                    await self._ask(body)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self._record.faults.append(f"{type(error).__name__}: {error} for {body}")

    def _body(self) -> dict[str, Any]:
        choose = self._random
        body: dict[str, Any] = {"prompt": choose.choice(self._prompts), "seed": self._next_seed}
        self._next_seed += 10
        body["size"] = choose.choice(self._sizes)
        body["guidance_scale"] = choose.choice([1.0, 2.0, 3.0])
        if choose.random() < STREAM_SHARE:
            return {**body, "stream": True, "partial_images": choose.randrange(4)}
        return {**body, "n": choose.choice([1, 1, 1, 2, 4])}

    async def _ask(self, body: dict[str, Any]) -> None:
        started = time.monotonic()
        answer = await self._http.post(ROUTE, json=body)
        self._record.statuses[str(answer.status_code)] += 1
        if answer.status_code == 429:
            await asyncio.sleep(float(answer.headers["retry-after"]))
            return
        if answer.status_code != 200:
            self._record.faults.append(f"{answer.status_code} {answer.text[:300]} for {body}")
            return
        self._record.latencies.append(time.monotonic() - started)
        if body.get("stream"):
            last = json.loads(answer.text.strip().split("\n")[-1].removeprefix("data: "))
            self._keep(body, last["b64_json"], last["seed"])
            return
        pictures = answer.json()["data"]
        if [picture["seed"] - body["seed"] for picture in pictures] != list(range(body["n"])):
            self._record.faults.append(f"seeds {[picture['seed'] for picture in pictures]} for {body}")
        for picture in pictures:
            self._keep(body, picture["b64_json"], picture["seed"])

    def _keep(self, body: dict[str, Any], file: str, seed: int) -> None:
        alone = {name: body[name] for name in ("prompt", "size", "guidance_scale")}
        self._record.pictures[json.dumps({**alone, "seed": seed})] = file

    async def _abort(self, body: dict[str, Any]) -> None:
        """Go away in the middle: before the answer, or within a stream."""
        self._record.statuses["aborted"] += 1
        try:
            async with asyncio.timeout(self._random.uniform(0.05, 10)):
                async with self._http.stream("POST", ROUTE, json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        if self._random.random() < 0.5:
                            return
        except TimeoutError:
            pass


async def load(server: LiveServer, record: Record, num_clients: int, seconds: float) -> None:
    """All clients at once, and samples of the server's memory beside them."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=900, limits=limits) as http:
        sizes, prompts = ["auto", *_sizes()], captions(200, seed=0)
        until = time.monotonic() + seconds
        sampling = asyncio.create_task(_sample_memory(server, record))
        clients = [Client(http, record, seed + 1, sizes, prompts) for seed in range(num_clients)]
        await asyncio.gather(*(client.run(until) for client in clients))
        sampling.cancel()


async def compare(server: LiveServer, record: Record, num_compared: int) -> list[str]:
    """The bodies whose picture, made alone, is another one."""
    bodies = list(record.pictures)
    chosen = random.Random(0).sample(bodies, min(num_compared, len(bodies)))
    different = []
    async with httpx.AsyncClient(base_url=server.url, timeout=900) as http:
        for body in chosen:
            answer = await http.post(ROUTE, json=json.loads(body))
            if answer.json()["data"][0]["b64_json"] != record.pictures[body]:
                different.append(body)
    return different


async def _sample_memory(server: LiveServer, record: Record) -> None:
    started = time.monotonic()
    while True:
        record.memory.append((time.monotonic() - started, len(record.pictures), server.resident_bytes()))
        await asyncio.sleep(SAMPLE_SECONDS)


def bytes_per_picture(samples: list[tuple[float, int, int]]) -> float:
    """Slope of the memory over the pictures made, over the later two thirds of the run."""
    later = [sample for sample in samples if sample[0] >= samples[-1][0] / 3]
    pictures = [float(sample[1]) for sample in later]
    return statistics.linear_regression(pictures, [float(sample[2]) for sample in later]).slope


def _sizes() -> list[str]:
    from sjd_vllm.demo import checkpoint_path
    from sjd_vllm.models.registry import load_family

    family = load_family(checkpoint_path())
    assert family is not None
    return [str(size) for size in family.sizes]


def main() -> int:
    """Run, check, append a row."""
    args = _parse_args()
    taken_on = provenance()
    record = Record()
    log = Path(tempfile.mkdtemp()) / "server.log"
    with live_server(["--max-batch-size", str(args.batch_size), *args.serve_flags], log) as server:
        asyncio.run(load(server, record, args.clients, args.seconds))
        left = server.left_after(30)
        print(dict(record.statuses), len(record.pictures), "pictures; left:", left, flush=True)
        different = asyncio.run(compare(server, record, args.compare))
    slope = bytes_per_picture(record.memory)
    megabytes = [sample[2] / 2**20 for sample in record.memory]
    latencies = sorted(record.latencies)
    row = {
        **taken_on,
        "clients": args.clients,
        "seconds": args.seconds,
        "batch_size": args.batch_size,
        "answered": record.statuses["200"],
        "pictures": len(record.pictures),
        "overload_answers": record.statuses["429"],
        "aborted": record.statuses["aborted"],
        "faults": len(record.faults),
        "latency_p50": rounded(latencies[len(latencies) // 2]),
        "compared_alone": min(args.compare, len(record.pictures)),
        "different": len(different),
        "memory_mb_at_third": rounded(megabytes[len(megabytes) // 3], 5),
        "memory_mb_at_end": rounded(megabytes[-1], 5),
        "bytes_per_picture": rounded(slope),
        "left": sum(left.values()),
    }
    append_rows(args.output, [row])
    print(json.dumps(row, indent=2))
    broken = [*record.faults[:20], *(f"another picture alone: {body}" for body in different)]
    if any(left.values()):
        broken.append(f"left at the end: {left}")
    if args.seconds >= SECONDS_TO_JUDGE_MEMORY and slope > FLAT_BYTES_PER_PICTURE:
        broken.append(f"memory grows by {slope:.0f} bytes a picture")
    print("\n".join(broken) or "every promise was kept", f"\nserver's log: {log}")
    return 1 if broken else 0


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--batch-size", type=int, default=16, help="pictures that the server decodes at once")
    parser.add_argument("--compare", type=int, default=200, help="pictures that are made again alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    parser.add_argument("serve_flags", nargs="*", metavar="-- FLAGS", help="any flags of `sjd-vllm serve`")
    args: argparse.Namespace = parser.parse_args()
    return args


if __name__ == "__main__":
    sys.exit(main())
