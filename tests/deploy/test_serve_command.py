"""`sjd-vllm serve --ray-replicas`: the application without a YAML file, on a running cluster; two workers an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from live_server import free_port, metric
from ray_cluster import Head, descendants, is_alive, kill, replica_processes, titled
from tiny_models import make_tiny_painter

START_SECONDS = 540
ROUTE = "/v1/images/generations"
BODY = {"prompt": "a red house", "seed": 7, "guidance_scale": 2.0}
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


@dataclass
class Command:
    """The running command."""

    flags: list[str]
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    def wait_for(self, is_so: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        until = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def command(head: Head, node_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("command")
    model, port = make_tiny_painter(folder / "painter"), free_port()
    flags = ["serve", "--ray-replicas", "1", "--ray-address", head.address, "--model", str(model)]
    flags += ["--tensor-parallel-size", "2", "--port", str(port), "--max-batch-size", "2"]
    with (folder / "log").open("w") as out, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        process = subprocess.Popen(
            [sys.executable, "-m", "sjd_vllm.cli", *flags], stdout=out, stderr=subprocess.STDOUT, env=node_variables
        )
        running = Command(flags, process, folder / "log", client)
        try:
            running.wait_for(running.is_healthy)
            yield running
        finally:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def picture(command: Command) -> str:
    answer = command.client.post(ROUTE, json=BODY)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["b64_json"])


def test_it_serves_the_model_with_two_workers(command: Command, picture: str) -> None:
    assert command.client.get("/v1/models").json()["data"][0]["id"] == "painter"
    again = command.client.post(ROUTE, json=BODY)
    assert again.json()["data"][0]["b64_json"] == picture
    (replica,) = replica_processes()
    assert len(titled(descendants(replica), "VLLM::Worker")) == 2


def test_a_second_one_on_the_same_cluster_is_refused(command: Command, node_variables: dict[str, str]) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "sjd_vllm.cli", *command.flags], env=node_variables, capture_output=True, text=True
    )
    assert second.returncode == 2
    assert "this cluster serves an application 'images' already" in second.stderr
    assert command.is_healthy()


def test_a_killed_worker_ends_its_replica_and_requests_wait_for_the_next_one(command: Command, picture: str) -> None:
    (victim,) = replica_processes()
    below = descendants(victim)
    worker = titled(below, "VLLM::Worker")[-1]
    os.kill(worker, signal.SIGSTOP)  # so that the request is in work, whatever the time
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(command.client.post, ROUTE, json=BODY)
        command.wait_for(lambda: metric(command.client, "sjd_vllm:images_pending_pictures") >= 1, 60)
        kill(worker)
        command.wait_for(lambda: not any(map(is_alive, [victim, *below])), 60)
        answer = waiting.result()
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"] == picture
    assert metric(command.client, "sjd_vllm:front_door_retries_total") == 1
    assert metric(command.client, "sjd_vllm:front_door_lost_total") == 0
    (other,) = replica_processes()
    assert other != victim


def test_a_signal_drains_and_stops_it(command: Command, picture: str) -> None:
    """The picture in work is finished first."""
    (replica,) = replica_processes()
    worker = titled(descendants(replica), "VLLM::Worker")[-1]
    os.kill(worker, signal.SIGSTOP)  # until nothing new is let in
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(command.client.post, ROUTE, json=BODY)
        command.wait_for(lambda: metric(command.client, "sjd_vllm:images_pending_pictures") >= 1, 60)
        command.process.send_signal(signal.SIGTERM)
        command.wait_for(lambda: not command.is_healthy(), 60)
        os.kill(worker, signal.SIGCONT)
        answer = waiting.result()
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"] == picture
    assert command.process.wait(180) == 0, command.log.read_text()[-3000:]
    assert not is_alive(replica)
    assert not command.is_healthy()
