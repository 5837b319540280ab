"""What the front door makes of a stream whose replica ends: one error event, or nothing where all has been said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from ray.exceptions import ActorDiedError

from sjd_vllm.deploy.front_door import Visit

START = {"type": "http.response.start", "status": 200, "headers": []}
EVENT = {"type": "http.response.body", "body": b"event: one\n\n", "more_body": True}
LAST = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize(
    ("sent", "num_lost"), [([EVENT, EVENT], 1), ([START], 1), ([EVENT, LAST], 0), ([START, EVENT, LAST], 0)]
)
def test_nothing_follows_the_last_message(sent: list[dict[str, Any]], num_lost: int) -> None:
    """An engine that dies says so in the stream and takes its replica with it: that may come right after the end."""

    async def messages() -> AsyncIterator[dict[str, Any]]:
        for message in sent:
            yield message
        raise ActorDiedError

    async def relayed() -> list[dict[str, Any]]:
        return [message async for message in Visit.events(visit, messages())]

    registry = CollectorRegistry()
    visit: Any = SimpleNamespace(_door=SimpleNamespace(_lost=Counter("lost", "lost", registry=registry)))
    passed_on = asyncio.run(relayed())
    assert passed_on[: len(sent)] == sent
    assert len(passed_on) == len(sent) + num_lost
    assert registry.get_sample_value("lost_total") == num_lost
    assert passed_on[-1]["more_body"] is False
    assert num_lost == (b'"code": "replica_lost"' in passed_on[-1]["body"])
