"""Checks of requests, and what they become in tokens; no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sjd_vllm.config import ConfigError
from sjd_vllm.images.request import ImageRequest, PictureRequest
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.registry import load_family


@pytest.fixture
def family(painter: Path) -> ImageFamily:
    found = load_family(painter)
    assert found is not None
    return found


def _pictures(family: ImageFamily, **settings: Any) -> list[PictureRequest]:
    return ImageRequest("a red house", **settings).pictures(family, 128)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"n": 0}, "n must be a whole number from 1 to 100"),
        ({"n": 101}, "n must be"),
        ({"n": True}, "n must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"guidance_scale": 0}, "guidance_scale must be a number greater than 0"),
        ({"guidance_scale": -2.0}, "guidance_scale must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"guidance_scale": "3"}, "guidance_scale must be"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be a number greater than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"method": "sdj"}, "Did you mean 'sjd'"),
        ({"num_speculative_tokens": 129}, "num_speculative_tokens must be a whole number from 0 to 128"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens must be"),
        ({"redraft": "couple"}, "Did you mean 'coupled'"),
        ({"first_guess": "unifrom"}, "Did you mean 'uniform'"),
    ],
)
def test_a_bad_value_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ImageRequest(**{"prompt": "a house", **settings})


def test_what_is_not_said_is_the_models_default(family: ImageFamily) -> None:
    (picture,) = _pictures(family)
    defaults = family.defaults
    assert (picture.temperature, picture.top_k, picture.top_p) == (
        defaults.temperature,
        defaults.top_k,
        defaults.top_p,
    )
    assert picture.sjd.guidance_scale == defaults.guidance_scale
    assert picture.sjd.image_size == str(family.sizes[0])
    assert picture.num_tokens == family.grammar(family.sizes[0]).num_tokens


def test_seeds_count_on_from_the_first(family: ImageFamily) -> None:
    assert [picture.seed for picture in _pictures(family, n=3, seed=7)] == [7, 8, 9]


def test_without_a_seed_one_is_drawn_and_told(family: ImageFamily) -> None:
    seeds = {_pictures(family)[0].seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_method_none_is_a_window_of_zero(family: ImageFamily) -> None:
    assert _pictures(family, method="none")[0].sjd.num_speculative_tokens == 0
    assert _pictures(family)[0].sjd.num_speculative_tokens is None


def test_the_unconditional_prompt_is_there_without_guidance_too(family: ImageFamily) -> None:
    (picture,) = _pictures(family, guidance_scale=1)
    assert list(picture.sjd.negative_prompt_token_ids) == family.negative_prompt_token_ids(None, family.sizes[0])


def test_a_negative_prompt_takes_the_place_of_the_empty_one(family: ImageFamily) -> None:
    (picture,) = _pictures(family, negative_prompt="a lake")
    assert list(picture.sjd.negative_prompt_token_ids) == family.prompt_token_ids("a lake", family.sizes[0])


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
def test_a_prompt_must_leave_room_for_a_picture(family: ImageFamily, param: str) -> None:
    # 128 positions, 43 tokens of a picture, <bos> and <boi>: 83 words fit
    settings = {"prompt": "a", param: "a " * 83}
    ImageRequest(**settings).pictures(family, 128)
    with pytest.raises(ConfigError, match=r"too long: 86 tokens, .* 128 positions leave 85") as caught:
        ImageRequest(**{**settings, param: "a " * 84}).pictures(family, 128)
    assert caught.value.param == param


def test_an_unknown_size_lists_the_known_ones(family: ImageFamily) -> None:
    with pytest.raises(ConfigError, match="36x36"):
        _pictures(family, size="512x512")


def test_sampling_params_carry_everything(family: ImageFamily) -> None:
    (picture,) = _pictures(
        family,
        seed=5,
        guidance_scale=3,
        temperature=0.9,
        top_k=7,
        top_p=0.8,
        redraft="gumbel",
        num_speculative_tokens=4,
    )
    params = picture.sampling_params()
    assert (params.seed, params.temperature, params.top_k, params.top_p) == (5, 0.9, 7, 0.8)
    assert params.max_tokens == 43
    assert params.extra_args == {
        "guidance_scale": 3.0,
        "negative_prompt_token_ids": list(picture.sjd.negative_prompt_token_ids),
        "image_size": "36x36",
        "num_speculative_tokens": 4,
        "redraft": "gumbel",
    }
