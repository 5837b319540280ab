"""Metrics and log lines on a real server: known requests, exact counts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from live_server import live_server, wait_until_idle
from sjd_vllm.images.api_protocol import MAX_BODY_BYTES

ROUTE = "/v1/images/generations"
NUM_TOKENS = 43
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics") / "server.log"


@pytest.fixture(scope="module")
def server(painter: Path, log: Path) -> Iterator[httpx.Client]:
    with live_server(["sjd-vllm", "serve", "--model", str(painter), "--max-batch-size", "4"], log) as client:
        yield client


def samples(server: httpx.Client) -> dict[tuple[str, str], float]:
    """(name, labels but the model's) -> value."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            key = (sample.name, ",".join(f"{k}={v}" for k, v in sorted(labels.items())))
            found[key] = found.get(key, 0.0) + sample.value
    return found


def post(server: httpx.Client, **body: Any) -> httpx.Response:
    return server.post(ROUTE, json={"prompt": "a red house", **body})


@pytest.fixture(scope="module")
def counted(server: httpx.Client) -> dict[tuple[str, str], float]:
    """What six requests for eight pictures and four refused ones added; the first request of all is not counted."""
    assert post(server, seed=0).status_code == 200
    before = samples(server)
    assert post(server, seed=1).status_code == 200
    assert post(server, seed=2, n=3, guidance_scale=3.0).status_code == 200
    assert post(server, seed=3, guidance_scale=1.0).status_code == 200
    assert post(server, seed=4, sjd={"method": "none"}).status_code == 200
    streamed = post(server, seed=5, stream=True, partial_images=2)
    assert streamed.text.count("event: image_generation.partial_image") <= 2
    assert post(server, n=99).status_code == 400
    assert post(server, model="another").status_code == 404
    too_large = b"x" * (MAX_BODY_BYTES + 1)
    assert server.post(ROUTE, content=too_large, headers={"content-type": "application/json"}).status_code == 413
    assert server.post(ROUTE, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    with server.stream("POST", ROUTE, json={"prompt": "a lake", "stream": True, "sjd": {"method": "none"}}) as answer:
        assert answer.status_code == 200
    wait_until_idle(server)
    for _ in range(50):
        after = samples(server)
        added = {key: value - before.get(key, 0.0) for key, value in after.items()}
        if added[("sjd_vllm:images_requests_total", "status=499")] == 1:
            break
        time.sleep(0.1)
    added["partials"] = streamed.text.count("event: image_generation.partial_image")  # type: ignore[index]
    return added


def test_requests_and_refusals(counted: dict[Any, float]) -> None:
    by_status = {labels: n for (name, labels), n in _named(counted, "sjd_vllm:images_requests_total")}
    assert {k: v for k, v in by_status.items() if v} == {
        "status=200": 5,
        "status=400": 1,
        "status=404": 1,
        "status=413": 1,
        "status=415": 1,
        "status=499": 1,
    }
    reasons = {labels: n for (name, labels), n in _named(counted, "sjd_vllm:images_refusals_total")}
    assert {k: v for k, v in reasons.items() if v} == {
        "reason=invalid_request": 1,
        "reason=model_not_found": 1,
        "reason=body_too_large": 1,
        "reason=content_type": 1,
    }


def test_pictures(counted: dict[Any, float]) -> None:
    # the client that left may have been served its whole picture by then
    num_pictures = counted[("sjd_vllm:picture_steps_count", "")]
    assert num_pictures in (7, 8)
    assert counted[("sjd_vllm:picture_decode_seconds_count", "")] == num_pictures
    assert num_pictures <= counted[("sjd_vllm:picture_steps_sum", "")] <= num_pictures * NUM_TOKENS
    assert counted[("sjd_vllm:partial_images_total", "")] >= counted["partials"]
    assert counted[("sjd_vllm:picture_pixel_seconds_count", "")] >= 7 + counted["partials"]
    assert counted[("sjd_vllm:images_pending_pictures", "")] == 0


def test_engine_counters(counted: dict[Any, float]) -> None:
    scored = counted[("sjd_vllm:drafts_scored_total", "")]
    accepted = counted[("sjd_vllm:drafts_accepted_total", "")]
    refreshed, kept = (counted[(f"sjd_vllm:drafts_{name}_total", "")] for name in ("refreshed", "kept"))
    assert scored > accepted > 0
    assert scored > refreshed >= kept > 0
    # every token but the first of each forward was an accepted draft; the picture that was left had none
    num_pictures = counted[("sjd_vllm:picture_steps_count", "")]
    assert accepted + counted[("sjd_vllm:picture_steps_sum", "")] == num_pictures * NUM_TOKENS
    assert counted[("sjd_vllm:steps_total", "")] >= NUM_TOKENS
    assert counted[("sjd_vllm:guidance_pairs", "")] == 0


def test_companions_are_in_no_count_of_vllm(counted: dict[Any, float]) -> None:
    finished = sum(n for _, n in _named(counted, "vllm:request_success_total"))
    assert finished in (7, 8)
    assert counted[("vllm:e2e_request_latency_seconds_count", "")] == finished
    assert counted[("vllm:num_requests_running", "")] == 0
    tokens = counted[("vllm:generation_tokens_total", "")]
    assert 7 * NUM_TOKENS <= tokens <= 8 * NUM_TOKENS


def test_log_lines_carry_the_clients_id(server: httpx.Client, log: Path) -> None:
    good, bad = post(server, seed=9), post(server, n=0)
    text = log.read_text()
    for answer, ending in ((good, "status 200"), (bad, "status 400 (invalid_request)")):
        assert f"{answer.headers['x-request-id']}: {ending}" in text
    assert f"{good.headers['x-request-id']}: 1 picture(s) of 36x36" in text
    assert "a red house" not in text


def test_the_dashboard_asks_for_metrics_that_exist(server: httpx.Client, counted: dict[Any, float]) -> None:
    names = {name for name, _ in samples(server)}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"\b(?:sjd_vllm|vllm):\w+", expression)}
    assert len(asked) > 20
    assert asked <= names
    ours = {name for name in names if name.startswith("sjd_vllm:") and not name.endswith("_created")}
    parts = re.compile("_(bucket|sum|count)$")
    assert {parts.sub("", name) for name in ours} == {parts.sub("", name) for name in asked if name in ours}


def _named(counted: dict[Any, float], name: str) -> list[tuple[tuple[str, str], float]]:
    return [(key, value) for key, value in counted.items() if key[0] == name]
