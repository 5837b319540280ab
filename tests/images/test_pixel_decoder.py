"""Pixels beside the engine: batches of what waits, failures that stay alone, requests that are given up."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from sjd_vllm.images.pixel_decoder import PixelDecoder
from sjd_vllm.models.demo.family import DemoFamily
from sjd_vllm.models.family import ImageFamily, ImageSize, Pixels
from sjd_vllm.models.registry import load_family

SMALL, LARGE = ImageSize(36, 24), ImageSize(36, 36)


@pytest.fixture
def family(painter: Path) -> ImageFamily:
    loaded = load_family(painter)
    assert loaded is not None
    return loaded


def picture(family: ImageFamily, size: ImageSize, code: int) -> list[int]:
    """A picture of one code."""
    grammar = family.grammar(size)
    legal = grammar.token_ids[grammar.code_of_column == code]
    return [
        int(legal[0]) if ranges[0][1] - ranges[0][0] > 1 else ranges[0][0] for ranges in grammar.legal_token_ranges()
    ]


def test_what_waits_is_decoded_together(family: ImageFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    is_open, has_begun = threading.Event(), threading.Event()
    decode = DemoFamily.decode_pixels

    def slow(self: DemoFamily, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        batches.append([ids[0] for ids in token_ids])
        has_begun.set()
        assert is_open.wait(30)
        return decode(self, token_ids, size)

    monkeypatch.setattr(DemoFamily, "decode_pixels", slow)
    decoder = PixelDecoder(family)
    first = decoder.decode(picture(family, LARGE, 0), LARGE)
    assert has_begun.wait(30)
    asked = [(LARGE, 1), (SMALL, 2), (LARGE, 3), (LARGE, 4)]
    waiting = [decoder.decode(picture(family, size, code), size) for size, code in asked]
    empty = decoder.decode([], SMALL)
    assert waiting[2].cancel()
    is_open.set()
    codes = [picture(family, LARGE, code)[0] for code in range(5)]
    assert first.result(30).pixels.shape == (36, 36, 3)
    assert waiting[1].result(30).pixels.shape == (24, 36, 3)
    assert empty.result(30).pixels.shape == (0, 36, 3)
    decoder.close()
    assert batches == [[codes[0]], [codes[1], codes[4]], [codes[2]]]
    for index in (0, 3):
        size, code = asked[index]
        alone = decode(family, [picture(family, size, code)], size)[0]  # type: ignore[arg-type]
        assert np.array_equal(waiting[index].result().pixels, alone)
        assert waiting[index].result().seconds > 0


def test_a_picture_that_fails_fails_alone(family: ImageFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = picture(family, LARGE, 1), picture(family, LARGE, 2)
    has_begun, is_open = threading.Event(), threading.Event()
    decode = DemoFamily.decode_pixels

    def failing(self: DemoFamily, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        has_begun.set()
        assert is_open.wait(30)
        if bad in token_ids:
            raise RuntimeError("a broken codebook")
        return decode(self, token_ids, size)

    monkeypatch.setattr(DemoFamily, "decode_pixels", failing)
    decoder = PixelDecoder(family)
    futures = [decoder.decode(ids, LARGE) for ids in (good, bad, good, good)]
    assert has_begun.wait(30)
    is_open.set()
    with pytest.raises(RuntimeError, match="a broken codebook"):
        futures[1].result(30)
    assert all(futures[index].result(30).pixels.shape == (36, 36, 3) for index in (0, 2, 3))
    decoder.close()


def test_an_illegal_token_is_told_at_once(family: ImageFamily) -> None:
    decoder = PixelDecoder(family)
    with pytest.raises(ValueError, match="not legal at position 0"):
        decoder.decode([1], LARGE)
    decoder.close()
