"""A server to load and to fuzz: `sjd-vllm serve` in processes of its own, and what can be seen of it from outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

_START_SECONDS = 300
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LEFT_METRICS = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")


@dataclass(frozen=True)
class LiveServer:
    """A running server.

    Attributes:
        url: without a path.
        process: the front-end; the engine is its child.
        log: what it writes.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def pids(self) -> list[int]:
        """The server's processes: the front-end and its descendants."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    found += [int(child) for child in children.read_text().split()]
                except OSError:
                    continue
        return found

    def engine_pid(self) -> int:
        """The process that runs the model, which names itself."""
        for pid in self.pids():
            if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
        raise RuntimeError("the server has no engine process")

    def resident_bytes(self) -> int:
        """Memory of all its processes; pages that they share count once for each."""
        total = 0
        for pid in self.pids():
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
            except OSError:
                continue  # it has just ended
        return total

    def num_handles(self) -> int:
        """Open files and threads of all its processes."""
        return sum(
            len(list(Path(f"/proc/{pid}/fd").iterdir())) + len(list(Path(f"/proc/{pid}/task").iterdir()))
            for pid in self.pids()
        )

    def left(self) -> dict[str, float]:
        """Requests and KV blocks that vLLM's metrics still know of; all 0 when nothing is."""
        lines = httpx.get(self.url + "/metrics", timeout=30).text.splitlines()
        return {
            name.rstrip("{"): sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
            for name in _LEFT_METRICS
        }

    def left_after(self, seconds: float) -> dict[str, float]:
        """The same, once it is all 0, or after so many seconds."""
        until = time.monotonic() + seconds
        while any((left := self.left()).values()) and time.monotonic() < until:
            time.sleep(0.2)
        return left


@contextmanager
def live_server(flags: Sequence[str], log: Path) -> Iterator[LiveServer]:
    """`sjd-vllm serve` with some flags on a free port, healthy at first and stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(sys.executable).parent / "sjd-vllm"
    with log.open("w") as out:
        process = subprocess.Popen([script, "serve", "--port", str(port), *flags], stdout=out, stderr=subprocess.STDOUT)
    server = LiveServer(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_healthy(server: LiveServer) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(server.url + "/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise RuntimeError(f"the server did not start\n{server.log.read_text()[-3000:]}")
