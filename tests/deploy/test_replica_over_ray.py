"""A replica whose engine's two workers are Ray actors in the replica's placement group, on a real cluster."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve
from ray.util import placement_group_table

from live_server import free_port
from ray_cluster import Head, connect, descendants, is_alive, kill, serve_run, stop_serve, titled
from sjd_vllm.images.pipeline import ImagePipeline
from tiny_models import make_tiny_painter

PROMPT = "a red house"
SEEDS = [7, 8, 9]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_painter(tmp_path_factory.mktemp("model") / "painter")


@pytest.fixture(scope="module")
def server(
    model: Path, head: Head, node_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    connect(head.address)
    port = free_port()
    args = {"model": str(model), "tensor_parallel_size": 2, "executor": "ray"}
    try:
        serve_run(head.address, port, args, tmp_path_factory.mktemp("serve"), node_variables)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            wait_until_it_serves(client, head)
            yield client
    finally:
        stop_serve()
        ray.shutdown()


def wait_until_it_serves(client: httpx.Client, head: Head) -> None:
    until = time.monotonic() + 600
    while client.get("/health").status_code != 200:
        assert time.monotonic() < until, f"{serve.status()}\n{head.logs()[-6000:]}"
        time.sleep(0.5)


def workers() -> list[int]:
    """The processes of the engine's workers, on the cluster that this process has started."""
    return titled(descendants(os.getpid()), "RayWorkerProc")


def test_pictures_are_those_of_one_worker(server: httpx.Client, model: Path) -> None:
    body = {"prompt": PROMPT, "n": len(SEEDS), "seed": SEEDS[0], "guidance_scale": 3.0}
    answer = server.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    with ImagePipeline(model) as pipeline:
        alone = pipeline.generate([PROMPT] * len(SEEDS), seed=SEEDS, guidance_scale=3.0)
    for given, picture in zip(answer.json()["data"], alone.pictures, strict=True):
        pixels = Image.open(io.BytesIO(base64.b64decode(given["b64_json"])))
        assert np.array_equal(np.asarray(pixels), np.asarray(picture.image))


def test_the_workers_are_actors_with_a_gpu_each_in_the_replicas_group(server: httpx.Client) -> None:
    assert len(workers()) == 2
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert [sorted(bundle.get("GPU", 0) for bundle in group["bundles"].values()) for group in groups] == [[0, 1, 1]]


def test_a_killed_worker_ends_the_replica_which_comes_back(server: httpx.Client, head: Head) -> None:
    old = workers()
    kill(old[0])
    until = time.monotonic() + 120
    while any(map(is_alive, old)):
        assert time.monotonic() < until, head.logs()[-6000:]
        time.sleep(0.5)
    wait_until_it_serves(server, head)
    assert not set(workers()) & set(old)
    answer = server.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 7})
    assert answer.status_code == 200, answer.text
