"""`sjd-vllm serve --ray-replicas`: the application without a YAML file, on a running cluster."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from live_server import free_port
from ray_cluster import Head, descendants
from tiny_models import make_tiny_painter

START_SECONDS = 540
pytestmark = pytest.mark.cluster


def test_the_short_form(head: Head, node_variables: dict[str, str], tmp_path: Path) -> None:
    model, port, log = make_tiny_painter(tmp_path / "painter"), free_port(), tmp_path / "log"
    flags = ["--model", str(model), "--ray-address", head.address, "--port", str(port), "--max-batch-size", "2"]
    command = [sys.executable, "-m", "sjd_vllm.cli", "serve", "--ray-replicas", "1", *flags]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=node_variables)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait_until_healthy(client, process, log)
            body = {"prompt": "a red house", "seed": 7, "guidance_scale": 2.0}
            first, again = (client.post("/v1/images/generations", json=body) for _ in range(2))
            assert first.status_code == 200, first.text
            assert first.json()["data"][0]["b64_json"] == again.json()["data"][0]["b64_json"]
            assert client.get("/v1/models").json()["data"][0]["id"] == "painter"
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        assert not descendants(process.pid)
    finally:
        process.kill()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
        assert not is_healthy(client)


def is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while not is_healthy(client):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.5)
