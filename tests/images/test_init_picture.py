"""Pictures that start from the upper rows of a given one."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sjd_vllm import ImagePipeline
from sjd_vllm.cli import main
from sjd_vllm.config import ConfigError
from sjd_vllm.images.init_picture import MAX_PIXELS
from sjd_vllm.images.request import ImageRequest, PictureRequest

PROMPT = "a red house"


def picture_file(width: int = 72, height: int = 50, kind: str = "PNG", *, seed: int = 0) -> bytes:
    """A noisy picture, larger than the model's and of another shape."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def with_given(request: PictureRequest, token_ids: list[int]) -> PictureRequest:
    negative = (*request.sjd.negative_prompt_token_ids, *token_ids)
    sjd = dataclasses.replace(request.sjd, negative_prompt_token_ids=negative, num_given_tokens=len(token_ids))
    return dataclasses.replace(request, given_token_ids=token_ids, sjd=sjd)


@pytest.mark.parametrize("settings", [{}, {"method": "none"}, {"temperature": 0.0, "redraft": "coupled"}])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_pictures_own_rows_lead_back_to_it(pipeline: ImagePipeline, rows: int, settings: dict[str, Any]) -> None:
    """Noise is keyed by the place in the picture, so the rest of a seed's picture follows from its first rows."""
    (request,) = pipeline.plan([ImageRequest(PROMPT, seed=11, **settings)])
    (whole,) = pipeline.decode([request]).pictures
    num_given = rows * pipeline.family.grammar(request.size).row_stride
    given = whole.token_ids[:num_given]
    (again,) = pipeline.decode([with_given(request, given)]).pictures
    assert again.token_ids == whole.token_ids
    assert np.array_equal(np.asarray(again.image), np.asarray(whole.image))
    assert again.counts()["num_tokens"] == whole.request.num_tokens - num_given
    assert again.step_compression >= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_rows_are_those_of_the_given_picture(pipeline: ImagePipeline, kind: str) -> None:
    family = pipeline.family
    size = family.sizes[0]
    file = picture_file(36, 36, kind)
    with Image.open(io.BytesIO(file)) as opened:
        codes = family.encode_pixels(np.asarray(opened.convert("RGB")), size)
    first, second = pipeline.generate(PROMPT, n=2, seed=3, init_image=file, keep_rows=2).pictures
    for picture in (first, second):
        assert family.grammar(size).codes(picture.token_ids)[:2].tolist() == codes[:2].tolist()
        assert picture.settings()["given_token_ids"] == family.grammar(size).tokens(codes[:2])
    assert first.token_ids != second.token_ids
    other = pipeline.generate(PROMPT, seed=3, init_image=picture_file(seed=1), keep_rows=2).pictures[0]
    assert other.token_ids[:14] != first.token_ids[:14]


def test_pictures_with_and_without_given_rows_share_a_batch(pipeline: ImagePipeline) -> None:
    requests = [
        ImageRequest(PROMPT, seed=4),
        ImageRequest(PROMPT, seed=4, init_image=picture_file(), keep_rows=4),
        ImageRequest("a lake", seed=5, init_image=picture_file(seed=2), keep_rows=1, size="36x24"),
    ]
    together = pipeline.decode(pipeline.plan(requests)).pictures
    for request, picture in zip(requests, together, strict=True):
        (alone,) = pipeline.decode(pipeline.plan([request])).pictures
        assert alone.token_ids == picture.token_ids


def test_a_wide_picture_is_the_upper_part_of_a_square_one(pipeline: ImagePipeline) -> None:
    square, wide = (pipeline.generate(PROMPT, seed=8, size=size).pictures[0] for size in ("36x36", "36x24"))
    assert wide.token_ids[:-1] == square.token_ids[: len(wide.token_ids) - 1]
    assert wide.image.size == (36, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_image": picture_file()}, "init_image needs keep_rows"),
        ({"keep_rows": 2}, "keep_rows needs init_image"),
        ({"init_image": picture_file(), "keep_rows": 6}, "keep_rows must be a whole number from 1 to 5"),
        ({"init_image": picture_file(), "keep_rows": 0}, "keep_rows must be a whole number from 1 to 5"),
        ({"init_image": b"no picture", "keep_rows": 2}, "cannot be read as PNG, JPEG, WEBP"),
        ({"init_image": picture_file()[:200], "keep_rows": 2}, "cannot be read as PNG, JPEG, WEBP"),
        ({"init_image": picture_file(kind="BMP"), "keep_rows": 2}, "cannot be read as PNG, JPEG, WEBP"),
    ],
)
def test_what_cannot_be_used_is_refused(pipeline: ImagePipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.plan([ImageRequest(PROMPT, **settings)])


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_unpacked(pipeline: ImagePipeline) -> None:
    buffer = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)).save(buffer, format="PNG")
    with pytest.raises(ConfigError, match="pixels"):
        pipeline.plan([ImageRequest(PROMPT, init_image=buffer.getvalue(), keep_rows=2)])


@pytest.mark.parametrize(
    ("num_given", "given", "message"),
    [(43, None, "less than a picture's 43"), (3, [1, 2, 3], "not legal"), (2, [20], "end the negative prompt")],
)
def test_the_engine_refuses_given_tokens_that_do_not_fit(
    pipeline: ImagePipeline, num_given: int, given: list[int] | None, message: str
) -> None:
    from vllm.exceptions import VLLMValidationError

    (request,) = pipeline.plan([ImageRequest(PROMPT, seed=1)])
    changed = with_given(request, [20] * 42 if given is None else given)
    changed = dataclasses.replace(changed, sjd=dataclasses.replace(changed.sjd, num_given_tokens=num_given))
    if message.startswith("end"):
        negative = (*changed.sjd.negative_prompt_token_ids, 21)
        changed = dataclasses.replace(changed, sjd=dataclasses.replace(changed.sjd, negative_prompt_token_ids=negative))
    with pytest.raises(VLLMValidationError, match=message):
        pipeline.decode([changed])


def test_the_command_finishes_a_picture(tmp_path: Path, painter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "given.png"
    given.write_bytes(picture_file())
    out = tmp_path / "out.png"
    flags = ["--model", str(painter), "--init-image", str(given), "--keep-rows", "3", "--seed", "2", "--json"]
    assert main(["generate", PROMPT, "-o", str(out), *flags]) == 0
    (picture,) = json.loads(capfd.readouterr().out)["pictures"]
    assert picture["num_tokens"] == 43 - 3 * 7
    assert picture["token_ids"][:21] == picture["given_token_ids"]
    assert Image.open(out).size == (36, 36)
    assert main(["generate", PROMPT, "-o", str(out), *flags[:2], "--init-image", "none.png", "--keep-rows", "3"]) == 2
    assert "cannot read a picture from 'none.png'" in capfd.readouterr().err
