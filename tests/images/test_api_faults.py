"""The images route over an engine that fails: each failure is told to its own client, and to no other."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from vllm.exceptions import QueueOverflowError, VLLMValidationError

from sjd_vllm.images.api_server import ROUTE, ImagesEndpoint
from sjd_vllm.models.demo.family import DemoFamily
from sjd_vllm.models.family import ImageFamily, ImageSize
from sjd_vllm.models.registry import load_family

FAILING_SEED = 5


class FakeEngine:
    """Writes the first legal token at each position, three at a time; fails at `FAILING_SEED` as it is told to."""

    def __init__(self, family: ImageFamily, settings: dict[str, Any] | None) -> None:
        model = SimpleNamespace(model=str(family.path), max_model_len=1024)
        self.vllm_config = SimpleNamespace(model_config=model, additional_config=settings, instance_id="fake")
        ranges = family.grammar(family.sizes[0]).legal_token_ranges()
        self.token_ids = [legal[0][0] for legal in ranges]
        self.error: Exception | None = None
        self.error_after = 0  # tokens
        self.num_running = 0
        self.errored = False

    async def generate(self, prompt: Any, sampling: Any, request_id: str) -> AsyncIterator[Any]:
        self.num_running += 1
        try:
            for start in range(0, len(self.token_ids), 3):
                if sampling.seed == FAILING_SEED and self.error is not None and start >= self.error_after:
                    raise self.error
                is_last = start + 3 >= len(self.token_ids)
                completion = SimpleNamespace(
                    token_ids=self.token_ids[start : start + 3],
                    finish_reason="stop" if is_last else None,
                    spec_decode_metrics=SimpleNamespace(per_step_accepted=[2] * -(-len(self.token_ids) // 3)),
                )
                yield SimpleNamespace(outputs=[completion], finished=is_last)
                await asyncio.sleep(0)
        finally:
            self.num_running -= 1


@pytest.fixture(scope="module")
def family(painter: Path) -> ImageFamily:
    loaded = load_family(painter)
    assert loaded is not None
    return loaded


@pytest.fixture
def engine(family: ImageFamily) -> FakeEngine:
    return FakeEngine(family, {"sjd": {}})


Post = Callable[..., httpx.Response]


@pytest.fixture
def post(engine: FakeEngine) -> Post:
    return lambda **body: posted(engine, body)[0]


def posted(engine: FakeEngine | None, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Answers to requests that are sent at once."""

    async def send() -> list[httpx.Response]:
        app = FastAPI()
        endpoint = ImagesEndpoint()
        endpoint.attach_router(app)
        await endpoint.init_state(engine, app.state, Namespace(served_model_name=None, model="painter"))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.post(ROUTE, json={"prompt": "a lake", **body}) for body in bodies))

    return asyncio.run(send())


def last_event(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200
    *_, last = answer.text.strip().split("\n\n")
    name, data = last.split("\n")
    event: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert event["type"] == name.removeprefix("event: ")
    return event


def test_without_failures_there_are_pictures(engine: FakeEngine) -> None:
    good, streamed = posted(engine, {"n": 2, "seed": 1}, {"stream": True, "partial_images": 2})
    assert [picture["seed"] for picture in good.json()["data"]] == [1, 2]
    assert last_event(streamed)["type"] == "image_generation.completed"
    assert streamed.text.count("event: image_generation.partial_image") == 2
    assert engine.num_running == 0


@pytest.mark.parametrize("is_settings_less", [True, False])
def test_a_server_that_makes_no_pictures_says_so(family: ImageFamily, is_settings_less: bool) -> None:
    (answer,) = posted(FakeEngine(family, None) if is_settings_less else None, {})
    assert answer.status_code == 400
    assert "--speculative-model=[sjd]" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "param", "said"),
    [
        (VLLMValidationError("too big.", parameter="negative_prompt_token_ids"), 400, "negative_prompt", "too big."),
        (VLLMValidationError("no such strategy.", parameter="redraft"), 400, "sjd.redraft", "no such strategy."),
        (QueueOverflowError(), 503, None, ""),
        (RuntimeError("a secret"), 500, None, "its log says more"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_told(
    engine: FakeEngine, error: Exception, status: int, param: str | None, said: str, stream: bool
) -> None:
    engine.error = error
    bad, good = posted(engine, {"seed": FAILING_SEED, "stream": stream}, {"seed": 1})
    assert bad.status_code == status
    told = bad.json()["error"]
    assert told["param"] == param
    assert said in told["message"]
    assert "secret" not in bad.text
    assert good.status_code == 200
    assert engine.num_running == 0


def test_a_failure_in_mid_stream_is_an_event(engine: FakeEngine, post: Post) -> None:
    engine.error, engine.error_after = RuntimeError("a secret"), 9
    event = last_event(post(seed=FAILING_SEED, stream=True))
    assert event["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(event)
    assert engine.num_running == 0


def test_one_failing_picture_gives_up_the_others_of_its_request(engine: FakeEngine, post: Post) -> None:
    engine.error, engine.error_after = RuntimeError(), 9
    assert post(seed=FAILING_SEED - 1, n=3).status_code == 500
    assert engine.num_running == 0


def test_a_picture_that_ends_early_is_no_picture(engine: FakeEngine, post: Post) -> None:
    del engine.token_ids[-3:]
    answer = post()
    assert answer.status_code == 500
    assert "ended this picture early" in answer.json()["error"]["message"]


@pytest.mark.parametrize("part", ["prompt_token_ids", "grammar"])
def test_a_failing_prompt_or_grammar_fails_its_request_alone(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    working = getattr(DemoFamily, part)

    def failing(self: Any, *args: Any) -> Any:
        if args[-1] == ImageSize(36, 24):
            raise RuntimeError("a secret")
        return working(self, *args)

    monkeypatch.setattr(DemoFamily, part, failing)
    bad, streamed, good = posted(engine, {"size": "36x24"}, {"size": "36x24", "stream": True}, {"seed": 1})
    for answer in (bad, streamed):
        assert answer.status_code == 500
        assert "secret" not in answer.text
    assert good.status_code == 200
    assert engine.num_running == 0


def test_a_token_that_the_grammar_forbids_fails_its_request_alone(engine: FakeEngine, post: Post) -> None:
    engine.token_ids[4] += 10_000
    assert post().status_code == 500
    assert last_event(post(stream=True))["error"]["type"] == "server_error"
    engine.token_ids[4] -= 10_000
    assert post().status_code == 200
