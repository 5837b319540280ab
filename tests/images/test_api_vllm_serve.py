"""The images API on plain `vllm serve`, with the plugin named in VLLM_PLUGINS and a key."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image

from live_server import live_server
from sjd_vllm.demo import checkpoint_path

KEY = "a-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    sjd = ["--speculative-model=[sjd]", "--num-speculative-tokens", "16"]
    limits = ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", "4"]
    command = ["vllm", "serve", str(checkpoint_path()), *sjd, *limits, "--api-key", KEY]
    log = tmp_path_factory.mktemp("serve") / "log"
    with live_server(command, log, {"VLLM_PLUGINS": "sjd_vllm"}) as client:
        yield client


def test_pictures_with_the_key_and_none_without(server: httpx.Client) -> None:
    address = f"{server.base_url}/v1"
    client = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=120)
    model = str(checkpoint_path())
    answers = [client.images.generate(prompt="a lake", model=model, extra_body={"seed": 7}) for _ in range(2)]
    pictures = []
    for answer in answers:
        assert isinstance(answer, ImagesResponse)
        assert answer.data is not None
        pictures.append(base64.b64decode(answer.data[0].b64_json or ""))
        figures = (answer.data[0].model_extra or {})["sjd"]
        assert figures["num_steps"] < figures["num_tokens"]
    assert pictures[0] == pictures[1]
    assert str(Image.open(io.BytesIO(pictures[0])).size) == "(96, 96)"
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a lake", extra_body={"sjd": {"num_speculative_tokens": 17}})
    assert caught.value.param == "sjd.num_speculative_tokens"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="another", max_retries=0).images.generate(prompt="a lake")
