"""A real server in another process, and what its metrics say about requests that are left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def live_server(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[httpx.Client]:
    """Run a command of this environment with --host and --port put behind `serve`, until it is healthy."""
    with live_process(command, log, environment) as (client, _):
        yield client


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def live_process(
    command: Sequence[str], log: Path, environment: dict[str, str] | None = None, port: int | None = None
) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """The same with its process."""
    port = port or free_port()
    name, serve, *flags = command
    script = Path(sys.executable).parent / name
    settings = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(script), serve, "--host", "127.0.0.1", "--port", str(port), *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=settings,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            _wait_until_healthy(client, process, log)
            yield client, process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise AssertionError(f"no answer in five minutes\n{log.read_text()[-3000:]}")


def metric(server: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(name)]
    assert lines, name
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def wait_until_idle(server: httpx.Client) -> None:
    """Return when no request and no KV block is left; fails after ten seconds."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
    for _ in range(100):
        if [metric(server, name) for name in names] == [0, 0, 0]:
            return
        time.sleep(0.1)
    raise AssertionError("requests or KV blocks are left")
