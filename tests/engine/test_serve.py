"""`vllm serve DEMO --speculative-model=[sjd]` over real HTTP: a picture, bad input, a client that goes away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from live_server import live_server, metric, wait_until_idle
from sjd_vllm.demo import checkpoint_path
from sjd_vllm.models.registry import load_family

FAMILY = load_family(checkpoint_path())
assert FAMILY is not None
SIZE = FAMILY.sizes[0]
GRAMMAR = FAMILY.grammar(SIZE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    sjd = ["--speculative-model=[sjd]", "--num-speculative-tokens", "16"]
    limits = ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", "8"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with live_server(["vllm", "serve", str(checkpoint_path()), *sjd, *limits], log) as client:
        yield client


def request(**settings: Any) -> dict[str, Any]:
    assert FAMILY is not None
    xargs = {
        "guidance_scale": 3.0,
        "negative_prompt_token_ids": FAMILY.negative_prompt_token_ids(None, SIZE),
        "image_size": str(SIZE),
        **settings.pop("vllm_xargs", {}),
    }
    return {
        "model": str(checkpoint_path()),
        "prompt": FAMILY.prompt_token_ids("a red house on a meadow at sunset", SIZE),
        "temperature": 1.0,
        "top_k": 100,
        "seed": 3,
        "return_token_ids": True,
        "vllm_xargs": xargs,
        **settings,
    }


def test_a_guided_picture_over_http(server: httpx.Client) -> None:
    answer = server.post("/v1/completions", json=request()).json()
    choice = answer["choices"][0]
    assert len(GRAMMAR.codes(choice["token_ids"])) == GRAMMAR.grid[0]  # raises on an id that the grammar forbids
    assert choice["finish_reason"] == "stop"
    again = server.post("/v1/completions", json=request()).json()
    assert again["choices"][0]["token_ids"] == choice["token_ids"]
    assert metric(server, "vllm:spec_decode_num_accepted_tokens_total") > 0


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"vllm_xargs": {"guidance_scale": 0}}, "guidance_scale"),
        ({"vllm_xargs": {"redraft": "couple"}}, "redraft"),
        ({"vllm_xargs": {"image_size": "7x7"}}, "image_size"),
        ({"logprobs": 2}, "logprobs"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
    ],
)
def test_bad_input_gets_an_openai_error_object(server: httpx.Client, settings: dict[str, Any], name: str) -> None:
    answer = server.post("/v1/completions", json=request(**settings))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert name in error["message"]
    assert error["param"] == name
    assert error["type"]


def test_a_client_that_goes_away_leaves_nothing(server: httpx.Client) -> None:
    with server.stream("POST", "/v1/completions", json=request(stream=True)) as stream:
        next(stream.iter_lines())
        assert metric(server, "vllm:num_requests_running") == 1  # the pair counts as one
    wait_until_idle(server)
    answer = server.post("/v1/completions", json=request(n=2)).json()
    assert [len(choice["token_ids"]) for choice in answer["choices"]] == [GRAMMAR.num_tokens] * 2
    wait_until_idle(server)
