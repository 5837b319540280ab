"""Overload, deadline, slow and absent clients, and access, on a real server of the demo model."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from live_server import live_server, wait_until_idle

KEY = "a-key"
ROUTE = "/v1/images/generations"
MAX_PENDING, REQUEST_TIMEOUT, CLIENT_TIMEOUT = 40, 8, 2
# Ten pictures in as many forwards as they have tokens.
SLOW = {"prompt": "a lake", "n": 10, "seed": 1, "sjd": {"method": "none"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    limits = {
        "max-batch-size": 2,
        "max-pending-pictures": MAX_PENDING,
        "request-timeout": REQUEST_TIMEOUT,
        "client-timeout": CLIENT_TIMEOUT,
    }
    flags = [f"--{name}={value}" for name, value in limits.items()]
    command = ["sjd-vllm", "serve", *flags, "--", "--api-key", KEY]
    with live_server(command, tmp_path_factory.mktemp("serve") / "log") as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client


def post_together(server: httpx.Client, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Answers to requests that are sent in this order, at once."""

    async def send() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.base_url, headers=server.headers, timeout=60) as client:
            tasks = []
            for body in bodies:
                tasks.append(asyncio.create_task(client.post(ROUTE, json=body)))
                await asyncio.sleep(0.1)
            return await asyncio.gather(*tasks)

    return asyncio.run(send())


def test_beyond_the_queue_429_and_beyond_the_deadline_504(server: httpx.Client) -> None:
    stream = {"prompt": "a lake", "stream": True}
    started = time.monotonic()
    *slow, refused, refused_stream = post_together(server, SLOW, SLOW, SLOW, SLOW, SLOW, stream)
    assert time.monotonic() - started < REQUEST_TIMEOUT + 5
    for answer in (refused, refused_stream):
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "server_busy"
    statuses = [answer.status_code for answer in slow]
    assert set(statuses) <= {200, 504}
    assert statuses[-1] == 504
    assert slow[-1].json()["error"]["code"] == "deadline_exceeded"
    wait_until_idle(server)
    assert server.post(ROUTE, json={"prompt": "a lake"}).status_code == 200


def test_a_stream_beyond_the_deadline_ends_with_an_error(server: httpx.Client) -> None:
    late = {"prompt": "a lake", "stream": True, "partial_images": 3, "sjd": {"method": "none"}}
    *_, answer = post_together(server, SLOW, SLOW, SLOW, late)
    if answer.status_code == 200:
        event = json.loads(answer.text.strip().split("\n")[-1].removeprefix("data: "))
        assert event["error"]["code"] == "deadline_exceeded"
    else:
        assert answer.status_code == 504
    wait_until_idle(server)


def test_clients_that_go_away_make_room(server: httpx.Client) -> None:
    for _ in range(2 * MAX_PENDING // SLOW["n"]):
        with pytest.raises(httpx.ReadTimeout):
            server.post(ROUTE, json=SLOW, timeout=0.3)
    wait_until_idle(server)
    assert server.post(ROUTE, json={"prompt": "a lake"}).status_code == 200


def test_half_a_body_is_given_up(server: httpx.Client) -> None:
    with socket.create_connection((server.base_url.host, server.base_url.port)) as slow:
        slow.settimeout(30)
        head = f"POST {ROUTE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
        slow.sendall(f'{head}content-length: 100\r\n\r\n{{"prompt": '.encode())
        started = time.monotonic()
        assert slow.recv(4096).split()[1] == b"408"
        assert CLIENT_TIMEOUT - 1 < time.monotonic() - started < CLIENT_TIMEOUT + 5
        while slow.recv(4096):
            pass  # the connection is closed too: what is left of the body has no place in it


def test_every_route_of_ours_wants_the_key_and_no_other_origin(server: httpx.Client) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    ours = [(method, path) for path in paths if path.startswith("/v1/images/") for method in paths[path]]
    assert ("post", ROUTE) in ours
    for method, path in ours:
        for key in ("", "Bearer another", f"Basic {KEY}", KEY):
            answer = httpx.request(method, f"{server.base_url}{path}", headers={"authorization": key}, json=SLOW)
            assert answer.status_code == 401, path
    origin = {"origin": "http://elsewhere.example"}
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert "access-control-allow-origin" not in server.get("/v1/models", headers=origin).headers
    refused = server.options(ROUTE, headers={**origin, **ask})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


def test_the_answers_are_in_the_openapi_document(server: httpx.Client) -> None:
    responses = server.get("/openapi.json").json()["paths"][ROUTE]["post"]["responses"]
    assert {"400", "404", "408", "413", "415", "429", "500", "503", "504"} <= set(responses)
    assert "retry-after" in responses["429"]["headers"]
