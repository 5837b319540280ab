"""The Ray Serve application under load: replicas that die, that come and go, throughput, the front door's part.

Each part starts the application on a Ray cluster of its own on this machine, keeps it under load, does what the part is
about, and counts: requests sent, answered, tried again by the front door, lost. A row a part goes to
results/ray_serve.csv. The exit code is 1 if a promise was broken: every request is answered, but streams that had begun
when their replica died, and each of those ends with an error event.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from live_server import free_port  # the tests' own way to start real processes
from ray_cluster import Head, descendants, kill, node_environment, ray_head, serve_run, titled
from sjd_vllm.demo.captions import captions
from sjd_vllm.images.flags import Parser
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded

RESULTS = Path(__file__).parent / "results" / "ray_serve.csv"
ROUTE = "/v1/images/generations"
PARTS = ("throughput-1", "throughput-2", "kill-replica", "kill-worker", "scale-1-3-1")
_START_SECONDS = 900


@dataclass
class Record:
    """What the clients saw."""

    sent: int = 0
    answered: int = 0
    error_events: int = 0  # streams that had begun and ended with an error event
    lost: int = 0  # anything else
    said: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)  # without the replica's part
    replicas: set[str] = field(default_factory=set)


class Application:
    """The application on a cluster of its own.

    Args:
        head: of the cluster.
        args: of `sjd_vllm.deploy.ray_serve:build`.
    """

    def __init__(self, head: Head, args: dict[str, Any]) -> None:
        self._head = head
        self._port = free_port()
        self._folder = Path(tempfile.mkdtemp())
        self.url = f"http://127.0.0.1:{self._port}"
        self.args = args

    def deploy(self) -> None:
        """Start it, or change it."""
        serve_run(self._head.address, self._port, self.args, self._folder, node_environment())

    async def num_replicas(self, http: httpx.AsyncClient) -> int:
        """That are up and tell their metrics."""
        try:
            text = (await http.get("/metrics")).text
        except httpx.HTTPError:
            return 0
        return len({line for line in text.splitlines() if line.startswith("sjd_vllm:images_pending_pictures{")})

    async def metric(self, http: httpx.AsyncClient, name: str) -> float:
        """Summed over its labels."""
        lines = (await http.get("/metrics")).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


async def user(http: httpx.AsyncClient, record: Record, number: int, stop: asyncio.Event, *, streams: bool) -> None:
    """Ask for pictures one after another."""
    prompts = captions(100, seed=number)
    for turn in itertools.count():
        if stop.is_set():
            return
        is_stream = streams and (turn + number) % 2 == 1
        body = {"prompt": prompts[turn % 100], "seed": 1000 * number + turn, "stream": is_stream}
        record.sent += 1
        began = time.perf_counter()
        try:
            answer = await http.post(ROUTE, json=body)
            text = answer.text
        except httpx.HTTPError as error:
            record.lost += 1
            record.said[repr(error)] += 1
            continue
        seconds = time.perf_counter() - began
        record.said[str(answer.status_code)] += 1
        if answer.status_code != 200:
            record.lost += 1
            record.said[text[:200]] += 1
        elif is_stream and "event: error" in text:
            record.error_events += 1
        elif is_stream and "image_generation.completed" not in text:
            record.lost += 1
        else:
            record.answered += 1
            record.latencies.append(seconds)
            record.replicas.add(answer.headers["x-sjd-replica"])
            if not is_stream:
                record.overheads.append(seconds - float(answer.headers["x-sjd-replica-seconds"]))


async def under_load(
    app: Application, users: int, streams: bool, work: Callable[[httpx.AsyncClient, Record], Awaitable[None]]
) -> tuple[Record, float, float]:
    """The record, the seconds of the load, and the front door's retries, while some work is done to the application."""
    record, stop = Record(), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=app.url, timeout=600, limits=limits) as http:
        retries = await app.metric(http, "sjd_vllm:front_door_retries_total")
        began = time.perf_counter()
        tasks = [asyncio.create_task(user(http, record, number, stop, streams=streams)) for number in range(users)]
        try:
            await work(http, record)
        finally:
            stop.set()
            await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
        retries = await app.metric(http, "sjd_vllm:front_door_retries_total") - retries
    return record, seconds, retries


async def wait_for(app: Application, is_enough: Callable[[int], bool]) -> None:
    """Until the number of replicas that are up is right."""
    until = time.monotonic() + _START_SECONDS
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as http:
        while not is_enough(await app.num_replicas(http)):
            if time.monotonic() > until:
                raise RuntimeError("the replicas did not come or go")
            await asyncio.sleep(1)


def replica_processes(head: Head) -> list[int]:
    """The processes of the replicas of a cluster, which name themselves."""
    return titled(descendants(os.getpid()), "ServeReplica:images:replicas")


async def run_part(part: str, head: Head, args: argparse.Namespace) -> dict[str, Any]:
    """Do one part and return its row."""
    settings: dict[str, Any] = {
        "model": args.model,
        "max_batch_size": args.batch_size,
        "gpus": 0,
        "cpus": 0.5,
        "health_check_period": 1,
        "replicas": 2 if part in ("throughput-2", "kill-replica") else 1,
    }
    if args.tensor_parallel_size > 1:
        settings["tensor_parallel_size"] = args.tensor_parallel_size
    if part == "scale-1-3-1":
        settings |= {"max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay": 2, "downscale_delay": 5}
    app = Application(head, {name: value for name, value in settings.items() if value is not None})
    app.deploy()
    await wait_for(app, lambda count: count >= settings["replicas"])

    async def for_a_while(http: httpx.AsyncClient, record: Record) -> None:
        await asyncio.sleep(args.seconds)

    async def killing(http: httpx.AsyncClient, record: Record) -> None:
        await _until(lambda: record.answered >= 4)
        victim = replica_processes(head)[0]
        if part == "kill-worker":
            kill(titled(descendants(victim), "VLLM::Worker")[-1])
        else:
            kill(victim)
        await asyncio.sleep(3)
        answered = record.answered
        await wait_for(app, lambda count: count >= settings["replicas"])
        await _until(lambda: record.answered >= answered + 8)

    async def growing(http: httpx.AsyncClient, record: Record) -> None:
        await wait_for(app, lambda count: count >= 3)
        answered = record.answered
        await _until(lambda: record.answered >= answered + 12)

    if part == "scale-1-3-1":
        record, seconds, retries = await under_load(app, args.users * 2, True, growing)
        # one user is left, who is too few for three replicas
        rest, more_seconds, more_retries = await under_load(app, 1, True, lambda *_: wait_for(app, lambda n: n == 1))
        for name in ("sent", "answered", "error_events", "lost"):
            setattr(record, name, getattr(record, name) + getattr(rest, name))
        record.said += rest.said
        record.replicas |= rest.replicas
        seconds, retries = seconds + more_seconds, retries + more_retries
    else:
        work = for_a_while if part.startswith("throughput") else killing
        record, seconds, retries = await under_load(app, args.users, not part.startswith("throughput"), work)
    print(part, dict(record.said), flush=True)
    latencies, overheads = sorted(record.latencies), sorted(record.overheads)
    return {
        "part": part,
        "users": args.users,
        "replicas_seen": len(record.replicas),
        "seconds": rounded(seconds),
        "sent": record.sent,
        "answered": record.answered,
        "retried": int(retries),
        "error_events": record.error_events,
        "lost": record.lost,
        "pictures_per_minute": rounded(60 * record.answered / seconds),
        "latency_p50": rounded(statistics.median(latencies)),
        "overhead_ms_p50": rounded(1e3 * statistics.median(overheads)) if overheads else "",
        "overhead_ms_p80": rounded(1e3 * overheads[len(overheads) * 4 // 5]) if overheads else "",
        "load_average": rounded(os.getloadavg()[0]),
        "note": args.note,
    }


async def _until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + _START_SECONDS
    while not is_so():
        if time.monotonic() > until:
            raise RuntimeError("no progress under load")
        await asyncio.sleep(0.2)


def main() -> int:
    """Do the parts asked for and append their rows."""
    args = _parse_args()
    broken = []
    taken_on = provenance()
    for part in args.parts.split(","):
        with ray_head(args.cpus, node_environment(VLLM_CPU_OMP_THREADS_BIND="nobind")) as head:
            row = {**taken_on, "model": args.model or "demo", **asyncio.run(run_part(part, head, args))}
        append_rows(args.output, [row])
        print(json.dumps(row, indent=2), flush=True)
        may_have_errors = part.startswith("kill")
        if row["lost"] or row["sent"] != row["answered"] + row["error_events"]:
            broken.append(f"{part}: requests were lost")
        if row["error_events"] and not may_have_errors:
            broken.append(f"{part}: streams ended with an error")
    print("\n".join(broken) or "every promise was kept")
    return 1 if broken else 0


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (all)")
    parser.add_argument("--model", default=None, help="a checkpoint (the demo model)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="workers of each engine")
    parser.add_argument("--users", type=int, default=4, help="requests at once")
    parser.add_argument("--seconds", type=float, default=60, help="of the load that throughput is measured under")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures that a replica decodes at once")
    parser.add_argument("--cpus", type=int, default=4, help="that the cluster takes itself to have")
    parser.add_argument("--note", default="", help="about the machine, for the row")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    args: argparse.Namespace = parser.parse_args()
    for part in args.parts.split(","):
        if part not in PARTS:
            parser.error(f"--parts must be some of {', '.join(PARTS)}; got {part!r}")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"ray_serve.py: error: {error}\n{error.stderr}")
