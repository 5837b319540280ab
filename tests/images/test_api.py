"""`sjd-vllm serve` and the openai package: pictures, seeds, formats, streams, refusals, clients that go away."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image

from live_server import live_server, metric, wait_until_idle
from sjd_vllm.demo import checkpoint_path
from sjd_vllm.images.api_protocol import MAX_BODY_BYTES, ImagesRequest
from sjd_vllm.models.registry import load_family

ROUTE = "/v1/images/generations"
PROMPT = "a calm lake at sunset, a red house on the left"
FAMILY = load_family(checkpoint_path())
assert FAMILY is not None
SIZE = FAMILY.sizes[0]
NUM_TOKENS = FAMILY.grammar(SIZE).num_tokens


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    command = ["sjd-vllm", "serve", "--max-batch-size", "6", "--", "--max-log-len", "100"]
    with live_server(command, tmp_path_factory.mktemp("serve") / "log") as client:
        yield client


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)


def make(client: openai.OpenAI, extra: dict[str, Any] | None = None, **settings: Any) -> ImagesResponse:
    answer = client.images.generate(**{"prompt": PROMPT, **settings}, extra_body=extra)
    assert isinstance(answer, ImagesResponse)
    return answer


def files(answer: ImagesResponse) -> list[bytes]:
    return [base64.b64decode(picture.b64_json or "") for picture in answer.data or []]


def image(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def extras(answer: ImagesResponse) -> list[dict[str, Any]]:
    return [picture.model_extra or {} for picture in answer.data or []]


def test_a_picture_with_its_seed_usage_and_figures(client: openai.OpenAI) -> None:
    answer = make(client, {"seed": 7}, model="demo", size="auto", quality="auto", user="somebody")
    (file,), (extra,) = files(answer), extras(answer)
    picture = image(file)
    assert (picture.format, picture.size) == ("PNG", (SIZE.width, SIZE.height))
    assert np.asarray(picture).std() > 10
    assert files(make(client, {"seed": 7})) == [file]
    assert files(make(client, {"seed": 8})) != [file]
    assert (answer.size, answer.output_format, answer.background) == (str(SIZE), "png", "opaque")
    assert answer.safety_identifier == "somebody"
    figures = extra["sjd"]
    assert extra["seed"] == 7
    assert figures["num_tokens"] == NUM_TOKENS
    assert figures["step_compression"] == NUM_TOKENS / figures["num_steps"] > 1.5
    assert len(figures["tokens_per_step"]) == figures["num_steps"]
    assert sum(figures["tokens_per_step"]) == NUM_TOKENS
    assert 1 == figures["tokens_per_step"][0] == min(figures["tokens_per_step"]) < max(figures["tokens_per_step"])
    assert figures["decode_seconds"] > figures["pixel_seconds"] > 0
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens == len(FAMILY.prompt_token_ids(PROMPT, SIZE)) == usage.input_tokens_details.text_tokens
    assert usage.output_tokens == NUM_TOKENS
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_each_of_several_pictures_can_be_made_again_alone(client: openai.OpenAI) -> None:
    answer = make(client, n=3)
    seeds = [extra["seed"] for extra in extras(answer)]
    assert len(set(files(answer))) == len(set(seeds)) == 3
    assert answer.usage is not None
    assert answer.usage.output_tokens == 3 * NUM_TOKENS
    with ThreadPoolExecutor() as threads:  # and in other company
        alone = list(threads.map(lambda seed: files(make(client, {"seed": seed}))[0], seeds))
    assert alone == files(answer)


def test_settings_are_honoured(client: openai.OpenAI) -> None:
    def picture(**extra: Any) -> bytes:
        return files(make(client, {"seed": 3, **extra}))[0]

    plain = make(client, {"seed": 3, "sjd": {"method": "none"}})
    assert extras(plain)[0]["sjd"]["num_steps"] == NUM_TOKENS
    assert extras(plain)[0]["sjd"]["tokens_per_step"] == [1] * NUM_TOKENS
    short = make(client, {"seed": 3, "sjd": {"num_speculative_tokens": 2, "redraft": "resample"}})
    assert NUM_TOKENS / 3 <= extras(short)[0]["sjd"]["num_steps"] < NUM_TOKENS
    base = picture()
    for extra in (
        {"guidance_scale": 1},
        {"negative_prompt": "a red house"},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.3},
        {"sjd": {"redraft": "coupled", "first_guess": "repeat_left"}},
    ):
        assert picture(**extra) != base, extra
    assert picture(temperature=0, seed=1) == picture(temperature=0, seed=2)


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_file_formats(client: openai.OpenAI, name: Any) -> None:
    (best,) = files(make(client, {"seed": 7}, output_format=name))
    (small,) = files(make(client, {"seed": 7}, output_format=name, output_compression=10))
    assert image(best).format == image(small).format == name.upper()
    assert len(small) < len(best) / 2
    reference = np.asarray(image(files(make(client, {"seed": 7}))[0]), dtype=float)
    assert np.abs(np.asarray(image(best), dtype=float) - reference).mean() < 5


def test_a_stream_shows_finished_rows_and_ends_with_the_whole(client: openai.OpenAI) -> None:
    (whole,) = files(make(client, {"seed": 7}))
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7})
    *partials, completed = list(stream)
    assert completed.type == "image_generation.completed"
    assert base64.b64decode(completed.b64_json) == whole
    assert completed.usage.output_tokens == NUM_TOKENS
    assert (completed.size, completed.output_format, completed.quality) == (str(SIZE), "png", "auto")
    assert (completed.model_extra or {})["seed"] == 7
    assert (completed.model_extra or {})["sjd"]["num_steps"] < NUM_TOKENS
    assert 1 <= len(partials) <= 3  # one that the next tokens overtook is left out
    heights = []
    for index, partial in enumerate(partials):
        assert partial.type == "image_generation.partial_image"
        assert partial.partial_image_index == index
        pixels = np.asarray(image(base64.b64decode(partial.b64_json)))
        assert pixels.shape == (SIZE.height, SIZE.width, 3)
        is_grey = (pixels == pixels[-1, -1]).all(axis=(1, 2))
        heights.append(SIZE.height - int(is_grey.sum()))
    assert 0 < heights[0] < SIZE.height
    assert heights == sorted(set(heights))


def test_a_stream_of_rows_shows_each_as_it_is_finished(client: openai.OpenAI) -> None:
    rows, columns = FAMILY.grammar(SIZE).grid
    extra = {"seed": 7, "sjd": {"partial_rows": True, "method": "none"}}
    *partials, completed = client.images.generate(prompt=PROMPT, stream=True, extra_body=extra)
    figures = [(partial.model_extra or {})["sjd"] for partial in partials]
    num_rows = [figure["num_rows"] for figure in figures]
    assert len(num_rows) > 3  # more than OpenAI's partial pictures; a loaded machine may leave some out
    assert num_rows == sorted(set(num_rows))
    assert num_rows[-1] < rows
    whole = np.asarray(image(base64.b64decode(completed.b64_json)))
    for partial, figure in zip(partials, figures, strict=True):
        assert columns * figure["num_rows"] < figure["num_tokens"] + 1
        pixels = np.asarray(image(base64.b64decode(partial.b64_json)))
        is_finished = (pixels != pixels[-1, -1]).any(axis=(1, 2))
        assert is_finished.sum() == SIZE.height * figure["num_rows"] // rows
        assert pixels.shape == whole.shape


def test_a_stream_without_partial_pictures_has_one_event(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt=PROMPT, stream=True, output_format="webp")
    (completed,) = list(stream)
    assert completed.type == "image_generation.completed"
    assert image(base64.b64decode(completed.b64_json)).format == "WEBP"


def test_a_wide_picture_is_the_upper_part_of_a_square_one(client: openai.OpenAI) -> None:
    wide = FAMILY.sizes[1]
    square, upper = (files(make(client, {"seed": 7}, size=str(size)))[0] for size in (SIZE, wide))
    assert image(upper).size == (wide.width, wide.height) != (SIZE.width, SIZE.height)
    reach = 48  # rows of pixels above the cut that the pixel decoder makes of codes below it too
    assert np.array_equal(np.asarray(image(upper))[:-reach], np.asarray(image(square))[: wide.height - reach])


def test_a_picture_that_starts_from_a_given_one(client: openai.OpenAI) -> None:
    (given,) = files(make(client, {"seed": 7}))
    rows, columns = FAMILY.grammar(SIZE).grid
    body = {"seed": 8, "keep_rows": rows // 2, "init_image": base64.b64encode(given).decode()}
    answer = make(client, body)
    (finished,) = files(answer)
    usage = answer.usage
    assert usage is not None
    num_given = rows // 2 * (columns + 1)
    assert usage.input_tokens_details.image_tokens == num_given
    assert usage.output_tokens == extras(answer)[0]["sjd"]["num_tokens"] == NUM_TOKENS - num_given
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    pixels, kept = (np.asarray(image(file), dtype=float) for file in (finished, given))
    half = SIZE.height // 2
    assert np.abs(pixels[: half - 12] - kept[: half - 12]).mean() < 10 < np.abs(pixels[half:] - kept[half:]).mean()
    assert files(make(client, {**body, "init_image": "data:image/png;base64," + body["init_image"]})) == [finished]
    *partials, completed = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=body)
    assert base64.b64decode(completed.b64_json) == finished
    assert all((partial.model_extra or {})["sjd"]["num_tokens"] > num_given for partial in partials)


@pytest.mark.parametrize(
    ("settings", "param", "said"),
    [
        ({"size": "1024x1024"}, "size", str(SIZE)),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"n": 2, "stream": True}, "n", "must be 1 with stream"),
        ({"partial_images": 1}, "partial_images", "needs stream"),
        ({"response_format": "url"}, "response_format", "not on a host"),
        ({"style": "vivid"}, "style", "not supported"),
        ({"prompt": "a red house " * 300}, "prompt", "too long"),
        ({"prompt": "a red house " * 300, "stream": True}, "prompt", "too long"),
        ({"extra_body": {"negative_prompt": "a red house " * 300}}, "negative_prompt", "too long"),
        ({"extra_body": {"guidance_scale": -1}}, "guidance_scale", "greater than 0"),
        ({"extra_body": {"guidence_scale": 1}}, "guidence_scale", "Did you mean 'guidance_scale'?"),
        ({"extra_body": {"sjd": {"num_speculative_tokens": 65}}}, "sjd.num_speculative_tokens", "from 0 to 64"),
        ({"extra_body": {"keep_rows": 3}}, "init_image", "needs init_image"),
        ({"extra_body": {"init_image": "?", "keep_rows": 3}}, "init_image", "not base64"),
        ({"extra_body": {"init_image": "aGVsbG8=", "keep_rows": 3}}, "init_image", "cannot be read as PNG"),
        ({"extra_body": {"init_image": "file:///etc/hostname", "keep_rows": 3}}, "init_image", "not base64"),
        ({"extra_body": {"sjd": {"redraft": "couple"}}, "stream": True}, "sjd.redraft", "Did you mean 'coupled'?"),
    ],
)
def test_refusals(client: openai.OpenAI, settings: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT, **settings})
    assert caught.value.param == param
    assert said in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        make(client, model="gpt-image-1")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert "'demo'" in caught.value.message
    assert caught.value.request_id is not None


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[[" * 9999, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "x"}', "text/plain", 415),
        (b" " * (MAX_BODY_BYTES + 1), "application/json", 413),
    ],
)
def test_a_body_that_is_no_request(server: httpx.Client, body: bytes, kind: str, status: int) -> None:
    answer = server.post(ROUTE, content=body, headers={"content-type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", ["\x00", "\U0001f3e0\u202e\uffff", "<eoi> <boi>", "a\n\n\tb", "0" * 100])
def test_a_strange_prompt_is_a_picture_or_a_refusal(server: httpx.Client, prompt: str) -> None:
    answer = server.post(ROUTE, json={"prompt": prompt})
    assert answer.status_code in (200, 400), answer.text


def test_a_client_that_goes_away_leaves_nothing(server: httpx.Client, client: openai.OpenAI) -> None:
    tokens_before = metric(server, "vllm:generation_tokens_total")
    plain = {"sjd": {"method": "none"}}
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt=PROMPT, n=10, extra_body=plain, timeout=0.5)
    wait_until_idle(server)
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=plain)
    assert next(iter(stream)).type == "image_generation.partial_image"
    assert metric(server, "vllm:num_requests_running") == 1
    stream.close()
    wait_until_idle(server)
    assert metric(server, "vllm:generation_tokens_total") - tokens_before < 10 * NUM_TOKENS
    assert len(files(make(client))) == 1


def test_the_rest_of_the_server_works_beside_it(server: httpx.Client, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    prompt = FAMILY.prompt_token_ids(PROMPT, SIZE)
    completion = client.completions.create(
        model="demo", prompt=prompt, max_tokens=5, extra_body={"return_token_ids": True}
    )
    assert len((completion.choices[0].model_extra or {})["token_ids"]) == 5
    assert metric(server, "vllm:spec_decode_num_accepted_tokens_total") > 0
    operation = server.get("/openapi.json").json()["paths"][ROUTE]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(ImagesRequest.model_fields)
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "b64_json" in json.dumps(operation)
    assert server.get(ROUTE).status_code == 405
