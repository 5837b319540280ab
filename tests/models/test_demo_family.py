"""The demo family on a tiny random checkpoint, through the checks that every family must pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import Engine, engine
from family_harness import FullLogits, check_greedy_picture, check_law, check_two_ranks, check_window_logits
from transformers import LlamaForCausalLM

from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.registry import load_family
from tiny_models import make_tiny_painter

PROMPT = "a red house"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_painter(tmp_path_factory.mktemp("families") / "painter")


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> ImageFamily:
    found = load_family(checkpoint)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> FullLogits:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids])).logits[0]

    return logits


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Engine]:
    with engine(checkpoint, window=8, max_num_seqs=128) as started:
        yield started


def test_logits_of_prompts_and_windows(
    running: Engine, reference: FullLogits, family: ImageFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_window_logits(running, reference, family, family.sizes[0], PROMPT, monkeypatch)


def test_a_greedy_picture_is_the_references_also_on_two_ranks(
    running: Engine, reference: FullLogits, family: ImageFamily, checkpoint: Path
) -> None:
    expected = check_greedy_picture(running, reference, family, family.sizes[0], PROMPT)
    check_two_ranks(checkpoint, family, family.sizes[0], PROMPT, expected)


def test_the_law_of_sampled_tokens(running: Engine, reference: FullLogits, family: ImageFamily) -> None:
    check_law(running, reference, family, family.sizes[0], PROMPT)


def test_codes_of_decoded_pixels(family: ImageFamily) -> None:
    """A random codebook gives no faithful round trip; the shapes, and that the codes are the encoder's, are shown."""
    size = family.sizes[0]
    pixels = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    codes = family.encode_pixels(pixels, size)
    assert codes.shape == family.grammar(size).grid
    again = family.decode_pixels([family.grammar(size).tokens(codes)], size)
    assert again.shape == (1, size.height, size.width, 3)
    assert torch.equal(family.encode_pixels(pixels, size), codes)
    assert not torch.equal(family.encode_pixels(255 - pixels, size), codes)
