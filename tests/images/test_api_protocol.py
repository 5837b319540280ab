"""The body of an images request without a server: what is read, what is refused, and under which name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.image_generate_params import ImageGenerateParamsNonStreaming

from sjd_vllm.images.api_protocol import MAX_BODY_BYTES, ApiError, ImagesRequest, json_schema, setting_error
from sjd_vllm.images.api_stream import partial_token_counts


def parse(**fields: Any) -> ImagesRequest:
    return ImagesRequest.parse(json.dumps({"prompt": "a lake", **fields}).encode())


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields).image_request()
    assert caught.value.status == 400
    return caught.value


def test_every_field_is_read() -> None:
    request = parse(
        n=3,
        seed=7,
        size="96x96",
        guidance_scale=2,
        negative_prompt="a house",
        temperature=0.5,
        top_k=10,
        top_p=0.9,
        sjd={"method": "sjd", "num_speculative_tokens": 4, "redraft": "coupled", "first_guess": "repeat_left"},
        user="u",
    )
    image = request.image_request()
    assert (image.prompt, image.n, image.seed, image.size, image.guidance_scale) == ("a lake", 3, 7, "96x96", 2)
    assert (image.negative_prompt, image.temperature, image.top_k, image.top_p) == ("a house", 0.5, 10, 0.9)
    assert (image.method, image.num_speculative_tokens) == ("sjd", 4)
    assert (image.redraft, image.first_guess) == ("coupled", "repeat_left")
    assert request.identifier == "u"


def test_null_is_the_same_as_absent() -> None:
    every = dict.fromkeys(ImagesRequest.model_fields)
    assert parse(**{**every, "prompt": "a lake"}) == parse()
    assert parse(size="auto").image_request() == parse().image_request()


def test_every_field_of_openai_is_known() -> None:
    openai = set(ImageGenerateParamsNonStreaming.__annotations__)
    assert {"prompt", "size", "style", "stream"} <= openai
    assert openai <= set(ImagesRequest.model_fields)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": " "}, "prompt", "empty"),
        ({"prompt": "x" * 32001}, "prompt", "at most 32000"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": ["a"]}, "prompt", "valid string"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 2, "stream": True}, "n", "must be 1 with stream"),
        ({"partial_images": 2}, "partial_images", "needs stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"quality": "hd"}, "quality", "There is one quality"),
        ({"background": "transparent"}, "background", "Pictures are opaque"),
        ({"response_format": "url"}, "response_format", "not on a host"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, "output_compression", "needs output_format jpeg or webp"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "less than or equal to 100"),
        ({"style": "vivid"}, "style", "style is not supported. Describe the style in the prompt."),
        ({"svg": {"model": "x"}}, "svg", "not supported. Pictures are made of pixels."),
        ({"frame_count": 4}, "frame_count", "not supported"),
        ({"seed": -1}, "seed", "seed must be"),
        ({"seed": 2**63}, "seed", "seed must be"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"guidance_scale": 0}, "guidance_scale", "greater than 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale", "at most 100"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": float("nan")}, "temperature", "number"),
        ({"top_k": -1}, "top_k", "0 to"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"negative_prompt": 3}, "negative_prompt", "valid string"),
        ({"guidence_scale": 2}, "guidence_scale", "Did you mean 'guidance_scale'?"),
        ({"size ": "1x1"}, "size ", "Did you mean 'size'?"),
        ({"sjd": {"redraf": "x"}}, "sjd.redraf", "Did you mean 'redraft'?"),
        ({"sjd": {"redraft": "couple"}}, "sjd.redraft", "Did you mean 'coupled'?"),
        ({"sjd": {"method": "jacobi"}}, "sjd.method", "'sjd' or 'none'"),
        ({"sjd": {"num_speculative_tokens": 129}}, "sjd.num_speculative_tokens", "from 0 to 128"),
        ({"sjd": 3}, "sjd", "should be an object"),
        ({"sjd": {"partial_rows": True}}, "sjd.partial_rows", "needs stream"),
        ({"sjd": {"partial_rows": 1}, "stream": True}, "sjd.partial_rows", "valid boolean"),
        ({"sjd": {"partial_rows": True}, "stream": True, "partial_images": 1}, "sjd.partial_rows", "one of them"),
    ],
)
def test_a_refusal_names_its_field(fields: dict[str, Any], param: str, said: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert said in error.message
    body = error.body()["error"]
    assert body == {"message": error.message, "type": "invalid_request_error", "param": param, "code": None}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"prompt": "\\ud800"}', b"[" * 5000, b"{}"]
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        ImagesRequest.parse(body)
    assert caught.value.status == 400


def test_the_longest_prompts_fit_into_the_largest_body() -> None:
    body = json.dumps({"prompt": "\U0001f3e0" * 32000, "negative_prompt": "\U0001f3e0" * 32000}).encode()
    assert len(body) < MAX_BODY_BYTES
    assert len(ImagesRequest.parse(body).prompt) == 32000


def test_names_of_the_engine_are_told_as_the_request_has_them() -> None:
    assert setting_error("no", "negative_prompt_token_ids").param == "negative_prompt"
    assert setting_error("no", "image_size").param == "size"
    assert setting_error("no", "first_guess").param == "sjd.first_guess"
    assert setting_error("no", None).param is None


def test_the_schema_stands_alone() -> None:
    schema = json_schema(ImagesRequest)
    assert "$ref" not in json.dumps(schema)
    assert set(schema["properties"]) == set(ImagesRequest.model_fields)
    assert schema["required"] == ["prompt"]
    assert "redraft" in json.dumps(schema["properties"]["sjd"])


def test_partial_pictures_are_spread_evenly() -> None:
    assert partial_token_counts(272, 0) == []
    assert partial_token_counts(272, 3) == [68, 136, 204]
