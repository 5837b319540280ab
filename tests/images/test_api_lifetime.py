"""How a server ends: its engine is killed, it is told to stop, or its pixel decoder is broken from the start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from live_server import free_port, live_process, live_server, wait_until_idle
from sjd_vllm.demo import checkpoint_path

ROUTE = "/v1/images/generations"
STREAM = {"prompt": "a lake", "stream": True, "partial_images": 3, "sjd": {"method": "none"}}
MAX_SECONDS_TO_END = 60  # what docs/serving.md states


def events(stream: Iterator[str]) -> Iterator[dict[str, object]]:
    for line in stream:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_the_death_of_the_engine_ends_streams_health_and_process(tmp_path: Path) -> None:
    with live_process(["sjd-vllm", "serve"], tmp_path / "log") as (server, process):
        (engine,) = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "EngineCore" in " ".join(child.cmdline())
        ]
        with server.stream("POST", ROUTE, json=STREAM) as answer:
            told = events(answer.iter_lines())
            assert next(told)["type"] == "image_generation.partial_image"
            os.kill(engine.pid, signal.SIGKILL)
            *_, last = told
        assert last["type"] == "error"
        assert last["error"]["code"] == "engine_dead"
        try:
            assert server.get("/health").status_code == 503
            answer = server.post(ROUTE, json={"prompt": "a lake"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        except httpx.TransportError:
            pass  # it was faster than we
        process.wait(30)
    assert not psutil.pid_exists(engine.pid) or psutil.Process(engine.pid).status() == psutil.STATUS_ZOMBIE


def test_sigterm_lets_pictures_be_finished_and_the_port_can_be_taken_again(tmp_path: Path) -> None:
    port = free_port()
    body = {"prompt": "a lake", "n": 4, "seed": 5, "sjd": {"method": "none"}}
    with live_process(["sjd-vllm", "serve"], tmp_path / "log", port=port) as (server, process):
        answers: list[httpx.Response] = []
        client = threading.Thread(target=lambda: answers.append(server.post(ROUTE, json=body)))
        client.start()
        idle = socket.create_connection((server.base_url.host, port))
        time.sleep(0.5)
        with server.stream("POST", ROUTE, json=STREAM) as stream:
            told = events(stream.iter_lines())
            next(told)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            *_, last = told
        client.join(60)
        process.wait(MAX_SECONDS_TO_END)
        assert time.monotonic() - started < MAX_SECONDS_TO_END
        idle.close()
        assert last["type"] == "image_generation.completed"
        assert answers[0].status_code == 200
    with live_process(["sjd-vllm", "serve"], tmp_path / "log2", port=port) as (server, _):
        again = server.post(ROUTE, json=body)
        assert [picture["b64_json"] for picture in again.json()["data"]] == [
            picture["b64_json"] for picture in answers[0].json()["data"]
        ]


def test_a_client_that_does_not_read_does_not_keep_the_server_alive(tmp_path: Path) -> None:
    with live_process(["sjd-vllm", "serve", "--client-timeout", "2"], tmp_path / "log") as (server, process):
        body = json.dumps({"prompt": "a lake", "n": 10}).encode()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((server.base_url.host, server.base_url.port))
        head = (
            f"POST {ROUTE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        deaf.sendall(head.encode() + body)
        time.sleep(1)
        wait_until_idle(server)
        process.send_signal(signal.SIGTERM)
        process.wait(MAX_SECONDS_TO_END)
        deaf.close()


def test_a_pixel_decoder_that_fails_fails_its_requests_alone(tmp_path: Path) -> None:
    """The decoder's weights are of another shape than its config says; the language model is sound."""
    model = shutil.copytree(checkpoint_path(), tmp_path / "model")
    config = json.loads((model / "vq" / "config.json").read_text())
    weights = model / "vq" / "model.safetensors"
    assert weights.is_file(), sorted(path.name for path in (model / "vq").iterdir())
    assert config
    weights.write_bytes(weights.read_bytes()[:1000])
    with live_server(["sjd-vllm", "serve", "--model", str(model)], tmp_path / "log") as server:
        answer = server.post(ROUTE, json={"prompt": "a lake", "n": 2})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        with server.stream("POST", ROUTE, json=STREAM) as stream:
            *_, last = events(stream.iter_lines())
        assert last["type"] == "error"
        text = server.post("/v1/completions", json={"model": "model", "prompt": [1, 2, 3], "max_tokens": 5})
        assert text.status_code == 200
        wait_until_idle(server)
        assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("kind", "said"), [("pickled weights", "no weights (*.safetensors)"), ("remote code", "trust_remote_code")]
)
def test_neither_pickled_weights_nor_remote_code_is_served(tmp_path: Path, kind: str, said: str) -> None:
    model = shutil.copytree(checkpoint_path(), tmp_path / "model")
    ran = tmp_path / "ran"
    if kind == "pickled weights":
        for weights in model.glob("*.safetensors"):
            weights.rename(model / "pytorch_model.bin")
    else:
        (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
        config = json.loads((model / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        config["model_type"] = "evil"
        (model / "config.json").write_text(json.dumps(config))
    script = Path(sys.executable).parent / "sjd-vllm"
    done = subprocess.run(
        [str(script), "serve", "--model", str(model), "--port", str(free_port())], capture_output=True, timeout=180
    )
    assert done.returncode != 0
    assert said in (done.stdout + done.stderr).decode()
    assert not ran.exists()
