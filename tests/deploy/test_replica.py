"""What a replica makes of an application's answers, on a web application of the framework that vLLM uses."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from sjd_vllm.deploy.replica import REPLICA_HEADER, SECONDS_HEADER, PictureReplica


class WithoutEngine(PictureReplica):
    """Has nothing to take down."""

    def __init__(self, app: FastAPI) -> None:
        self._id, self._app, self._engine = "replica-1", app, SimpleNamespace(errored=False)

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.fixture
def replica() -> PictureReplica:
    """A replica whose engine nobody asks."""
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await request.body())

    @app.post("/fails")
    async def fails() -> None:
        raise ValueError("a bug")

    @app.post("/waits")
    async def waits(request: Request) -> PlainTextResponse:
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        app.state.saw_the_client_leave = True
        return PlainTextResponse("")

    return WithoutEngine(app)


def scope(path: str) -> dict[str, Any]:
    named = {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": []}
    return {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", **named}


async def answer(replica: PictureReplica, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    start, *rest = [message async for message in replica.request(scope(path), body)]
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(message.get("body", b"") for message in rest)


def test_an_answer_names_its_replica(replica: PictureReplica) -> None:
    status, headers, body = asyncio.run(answer(replica, "/echo", b"what was sent"))
    assert (status, body) == (200, b"what was sent")
    assert headers[REPLICA_HEADER] == "replica-1"
    assert 0 < float(headers[SECONDS_HEADER]) < 60


def test_a_bug_in_a_route_is_answered_and_logged(
    replica: PictureReplica, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The framework answers 500 and then raises the error again, for its server's log."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("ERROR"):
        status, _, body = asyncio.run(answer(replica, "/fails"))
    assert (status, body) == (500, b"Internal Server Error")
    assert "POST /fails failed" in caplog.text
    assert "a bug" in caplog.text


def test_closing_the_answer_is_the_clients_leaving(replica: PictureReplica) -> None:
    async def leave() -> None:
        messages = replica.request(scope("/waits"), b"")
        reading = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(leave())
    assert replica._app.state.saw_the_client_leave


def test_an_error_of_a_dead_engine_is_held_back(replica: PictureReplica) -> None:
    """The process is about to end, and the front door asks another replica: the client need not know."""
    replica._engine = SimpleNamespace(errored=True)

    async def waited() -> None:
        async with asyncio.timeout(0.3):
            await answer(replica, "/fails")

    with pytest.raises(TimeoutError):
        asyncio.run(waited())
