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
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from live_server import free_port  # the tests' own way to start real processes
from ray_cluster import Head, descendants, kill, node_environment, ray_head, replica_processes, serve_run, titled
from sjd_vllm.demo.captions import captions
from sjd_vllm.deploy.settings import DeploySettings
from sjd_vllm.images.flags import Parser
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded
from tiny_models import make_tiny_painter

RESULTS = Path(__file__).parent / "results" / "ray_serve.csv"
ROUTE = "/v1/images/generations"
PROMPT = "a calm lake at sunset"
PARTS = ("one-user", "throughput-1", "throughput-2", "kill-replica", "kill-worker", "scale-1-3-1")
_START_SECONDS = 900
_RETRIES = "sjd_vllm:front_door_retries_total"


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
    most_replicas: int = 0  # at once
    seconds: float = 0


class Application:
    """The application on a cluster of its own.

    Args:
        head: of the cluster.
        settings: of the application.
    """

    def __init__(self, head: Head, settings: DeploySettings) -> None:
        self._head = head
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.settings = settings

    def start(self) -> None:
        """Hand it to the cluster, by `serve run`."""
        with tempfile.TemporaryDirectory() as folder:
            args = self.settings.to_mapping()
            serve_run(self._head.address, self._port, args, Path(folder), node_environment())

    async def metrics(self, http: httpx.AsyncClient) -> list[str]:
        """Lines of the scrape; none while the application cannot answer."""
        try:
            answer = await http.get("/metrics")
        except httpx.HTTPError:
            return []
        return answer.text.splitlines() if answer.status_code == 200 else []

    async def replicas(self, http: httpx.AsyncClient) -> set[str]:
        """Those that are up and tell their metrics, by their metrics' labels."""
        name = "sjd_vllm:images_pending_pictures{"
        return {line.rsplit(" ", 1)[0] for line in await self.metrics(http) if line.startswith(name)}

    async def wait_for_replicas(self, http: httpx.AsyncClient, are_right: Callable[[set[str]], bool]) -> set[str]:
        """Those that are up, as soon as they are right."""
        until = time.monotonic() + _START_SECONDS
        while not are_right(found := await self.replicas(http)):
            if time.monotonic() > until:
                raise RuntimeError(f"the replicas did not come or go: {found}")
            await asyncio.sleep(0.5)
        return found

    async def retries(self, http: httpx.AsyncClient) -> int:
        """Requests that the front door has sent again."""
        lines = [line for line in await self.metrics(http) if line.startswith(_RETRIES + "{")]
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


Work = Callable[[Application, httpx.AsyncClient, Record], Awaitable[None]]


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
        except httpx.HTTPError as error:
            record.lost += 1
            record.said[repr(error)] += 1
            continue
        seconds = time.perf_counter() - began
        record.said[str(answer.status_code)] += 1
        if answer.status_code != 200:
            record.lost += 1
            record.said[answer.text[:200]] += 1
        elif is_stream and "event: error" in answer.text:
            record.error_events += 1
        elif is_stream and "image_generation.completed" not in answer.text:
            record.lost += 1
        else:
            record.answered += 1
            record.latencies.append(seconds)
            record.replicas.add(answer.headers["x-sjd-replica"])
            if not is_stream:
                record.overheads.append(seconds - float(answer.headers["x-sjd-replica-seconds"]))


async def under_load(app: Application, record: Record, users: int, work: Work, *, streams: bool) -> None:
    """Add to the record what users see while some work is done to the application."""
    stop = asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=app.url, timeout=600, limits=limits) as http:
        began = time.perf_counter()
        tasks = [asyncio.create_task(user(http, record, number, stop, streams=streams)) for number in range(users)]
        try:
            await work(app, http, record)
        finally:
            stop.set()
            await asyncio.gather(*tasks)
        record.seconds += time.perf_counter() - began


def for_seconds(seconds: float) -> Work:
    """Nothing but load."""

    async def work(app: Application, http: httpx.AsyncClient, record: Record) -> None:
        await asyncio.sleep(seconds)

    return work


def killing(times: int, victim_of: Callable[[int], int]) -> Work:
    """Kill a process of a replica (`victim_of` says which, by the replica's own), wait for a new replica, and again."""

    async def work(app: Application, http: httpx.AsyncClient, record: Record) -> None:
        for turn in range(times):
            await _until_answered(record, record.answered + 4)
            before = await app.wait_for_replicas(http, lambda up: len(up) == app.settings.replicas)
            processes = replica_processes()
            kill(victim_of(processes[turn % len(processes)]))
            await app.wait_for_replicas(
                http, lambda up, before=before: len(up) == app.settings.replicas and up != before
            )
            await _until_answered(record, record.answered + 8)

    return work


async def growing(app: Application, http: httpx.AsyncClient, record: Record) -> None:
    """Until all replicas that there may be have come, and a while longer."""
    most = app.settings.max_replicas
    record.most_replicas = len(await app.wait_for_replicas(http, lambda up: len(up) == most))
    await _until_answered(record, record.answered + 12)


async def shrinking(app: Application, http: httpx.AsyncClient, record: Record) -> None:
    """Until one replica is left, and a while longer."""
    await app.wait_for_replicas(http, lambda up: len(up) == 1)
    await _until_answered(record, record.answered + 4)


async def _until_answered(record: Record, number: int) -> None:
    until = time.monotonic() + _START_SECONDS
    while record.answered < number:
        if time.monotonic() > until:
            raise RuntimeError(f"no progress under load: {record}")
        await asyncio.sleep(0.1)


def settings_of(part: str, args: argparse.Namespace) -> DeploySettings:
    """Of the part's application."""
    special: dict[str, Any] = {}
    if part in ("throughput-2", "kill-replica"):
        special = {"replicas": 2}
    elif part == "scale-1-3-1":
        special = {"max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay": 2, "downscale_delay": 5}
    elif part == "kill-worker":
        special = {"model": str(make_tiny_painter(Path(tempfile.mkdtemp()) / "tiny-random")), "tensor_parallel_size": 2}
    common = {"model": args.model, "max_batch_size": args.batch_size, "gpus": 0, "health_check_period": 1}
    return DeploySettings(**{**common, **special})


async def run_part(part: str, app: Application, args: argparse.Namespace) -> dict[str, Any]:
    """Do one part and return its row."""
    record = Record()
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as http:
        up = await app.wait_for_replicas(http, lambda up: len(up) == app.settings.replicas)
        record.most_replicas = len(up)
        warm_up = [http.post(ROUTE, json={"prompt": PROMPT}, timeout=600) for _ in range(4 * app.settings.replicas)]
        for answer in await asyncio.gather(*warm_up):
            answer.raise_for_status()
        match part:
            case "one-user":
                await under_load(app, record, 1, for_seconds(args.seconds), streams=False)
            case "throughput-1" | "throughput-2":
                await under_load(app, record, args.users, for_seconds(args.seconds), streams=False)
            case "kill-replica":
                await under_load(app, record, args.users, killing(args.kills, lambda pid: pid), streams=True)
            case "kill-worker":
                await under_load(app, record, args.users, killing(args.kills, _worker_of), streams=True)
            case "scale-1-3-1":
                await under_load(app, record, args.users, growing, streams=True)
                await under_load(app, record, 1, shrinking, streams=True)
        retried = await app.retries(http)
    print(part, dict(record.said), flush=True)
    return {"part": part, "users": 1 if part == "one-user" else args.users, **_row(app, record, retried)}


def _worker_of(replica: int) -> int:
    return titled(descendants(replica), "VLLM::Worker")[-1]


def _row(app: Application, record: Record, retried: int) -> dict[str, Any]:
    latencies, overheads = sorted(record.latencies), [1e3 * seconds for seconds in sorted(record.overheads)]
    return {
        "model": Path(app.settings.model).name if app.settings.model else "demo",
        "batch_size": app.settings.max_batch_size,
        "tensor_parallel_size": app.settings.tensor_parallel_size,
        "most_replicas": record.most_replicas,
        "replicas_seen": len(record.replicas),
        "seconds": rounded(record.seconds),
        "sent": record.sent,
        "answered": record.answered,
        "retried": retried,
        "error_events": record.error_events,
        "lost": record.lost,
        "pictures_per_minute": rounded(60 * record.answered / record.seconds),
        **{f"latency_p{q}": rounded(_percentile(latencies, q)) for q in (20, 50, 80)},
        **{f"overhead_ms_p{q}": rounded(_percentile(overheads, q)) for q in (20, 50, 80)},
        "load_average": rounded(os.getloadavg()[0]),
    }


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=10, method="inclusive")[percent // 10 - 1]


def main() -> int:
    """Do the parts asked for and append their rows."""
    args = _parse_args()
    broken = []
    taken_on = provenance()
    for part in args.parts.split(","):
        try:
            with ray_head(args.cpus, node_environment(VLLM_CPU_OMP_THREADS_BIND="nobind")) as head:
                app = Application(head, settings_of(part, args))
                app.start()
                row = {**taken_on, "ray": version("ray"), **asyncio.run(run_part(part, app, args)), "note": args.note}
        except Exception:
            traceback.print_exc()  # the other parts have their own clusters
            broken.append(f"{part}: did not come to its end")
            continue
        append_rows(args.output, [row])
        print(json.dumps(row, indent=2), flush=True)
        if row["lost"] or row["sent"] != row["answered"] + row["error_events"]:
            broken.append(f"{part}: requests were lost")
        if row["error_events"] and not part.startswith("kill"):
            broken.append(f"{part}: streams ended with an error")
    print("\n".join(broken) or "every promise was kept")
    return 1 if broken else 0


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (all)")
    parser.add_argument("--model", default=None, help="a checkpoint (the demo model); kill-worker has one of its own")
    parser.add_argument("--users", type=int, default=8, help="requests at once")
    parser.add_argument("--seconds", type=float, default=60, help="of the load that throughput is measured under")
    parser.add_argument("--kills", type=int, default=3, help="processes that are killed, one after another")
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
    sys.exit(main())
