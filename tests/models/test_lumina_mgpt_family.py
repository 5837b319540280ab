"""Lumina-mGPT on a tiny random checkpoint: sizes, size tokens, ends of lines; the rest is Chameleon's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import Engine, engine
from family_harness import FullLogits, check_greedy_picture, check_law, check_two_ranks, check_window_logits
from reference_chameleon import decode_pixels
from safetensors.torch import load_file, save_file
from tiny_chameleon import NUM_CODES, make_model, reference_of, vocabulary, vq_weights, write_lumina, write_vqgan

from sjd_vllm.images.request import ImageRequest
from sjd_vllm.models.family import ImageFamily, ImageSize
from sjd_vllm.models.lumina_mgpt.family import crop_sizes
from sjd_vllm.models.registry import load_family

PROMPT = "a red house"
SIZES = {"heads": 4, "kv_heads": 4, "ranks": 2}  # two rows in the norms of queries and keys
WIDE, TALL = ImageSize(16, 4), ImageSize(4, 16)


def family_of(path: Path) -> ImageFamily:
    found = load_family(path)
    assert found is not None
    assert found.name == "lumina_mgpt"
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lumina(tmp_path_factory.mktemp("lumina") / "Lumina-mGPT-7B-8", make_model(**SIZES))


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> ImageFamily:
    return family_of(checkpoint)


@pytest.fixture(scope="module")
def reference() -> FullLogits:
    logits: FullLogits = reference_of(make_model(**SIZES))
    return logits


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Engine]:
    with engine(checkpoint, window=8, max_num_seqs=128) as started:
        yield started


def test_logits_of_prompts_and_windows(
    running: Engine, reference: FullLogits, family: ImageFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_window_logits(running, reference, family, family.sizes[0], PROMPT, monkeypatch)


def test_greedy_pictures_of_three_shapes_are_the_references_also_on_two_ranks(
    running: Engine, reference: FullLogits, family: ImageFamily, checkpoint: Path
) -> None:
    pictures = [
        check_greedy_picture(running, reference, family, size, PROMPT) for size in (family.sizes[0], WIDE, TALL)
    ]
    check_two_ranks(checkpoint, family, TALL, PROMPT, pictures[2])
    ids = vocabulary()
    assert [token for token in pictures[0] if token == ids["<reserved08799>"]] == pictures[0][4:21:5]
    assert [len(picture) for picture in pictures] == [4 * 5 + 1, 2 * 9 + 1, 8 * 3 + 1]
    assert {picture[-1] for picture in pictures} == {ids["<eoss>"]}


def test_the_law_of_sampled_tokens(running: Engine, reference: FullLogits, family: ImageFamily) -> None:
    check_law(running, reference, family, family.sizes[0], PROMPT)


def test_prompts(family: ImageFamily) -> None:
    """The template, the separator, begin of image, height, width; the unconditional prompt is the last three."""
    ids = vocabulary()
    template = ("Generate", "an", "image", "of", "16x4", "according", "to", "the", "following")
    words = [*template, "<unk>", "a", "red", "house"]  # the tiny tokenizer has no "prompt:"
    begin = ["<racm3:break>", "<reserved08801>", "<reserved08804>"]
    expected = [ids[token] for token in ("<s>", *words, "<reserved08706>", *begin)]
    assert family.prompt_token_ids(PROMPT, WIDE) == expected
    assert family.negative_prompt_token_ids(None, WIDE) == [ids[token] for token in begin]
    assert family.negative_prompt_token_ids("lake", WIDE) == family.prompt_token_ids("lake", WIDE)
    assert family.prompt_token_ids(PROMPT, TALL)[-2:] == [ids["<reserved08804>"], ids["<reserved08801>"]]
    (picture,) = ImageRequest(PROMPT, size="16x4").pictures(family, 256)
    assert picture.prompt_token_ids == expected
    assert picture.num_tokens == 19
    assert (picture.temperature, picture.top_k, picture.sjd.guidance_scale) == (1.0, 2000, 3.0)


def test_sizes_are_the_authors() -> None:
    """The first and last for 512, as public lists of them have it, and the walk along the area that the authors do."""
    units = crop_sizes((512 // 32) ** 2)
    sizes = [f"{width * 32}x{height * 32}" for width, height in units]
    assert sizes[:8] == ["1024x256", "992x256", "960x256", "928x256", "896x256", "896x288", "864x288", "832x288"]
    assert sizes[-1] == "256x1024"
    for side in (512, 768, 1024):
        area = (side // 32) ** 2
        walked, width, height = [], area, 1
        while width:
            if max(width, height) / min(width, height) <= 4:
                walked.append((width, height))
            width, height = (width, height + 1) if (height + 1) * width <= area else (width - 1, height)
        assert crop_sizes(area) == walked
        assert (side // 32, side // 32) in walked


def test_the_target_size_is_in_the_name_or_the_config(checkpoint: Path, tmp_path: Path) -> None:
    def sizes(folder: str, **changes: Any) -> list[str]:
        path = tmp_path / folder
        if not path.exists():
            shutil.copytree(checkpoint, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        return [str(size) for size in family_of(path).sizes]

    assert sizes("models--Alpha-VLLM--Lumina-mGPT-7B-8/snapshots/0123abc")[0] == "8x8"
    assert sizes("renamed", sjd={"target_size": 8})[:3] == ["8x8", "16x4", "12x4"]
    assert sizes("told", _name_or_path="Alpha-VLLM/Lumina-mGPT-7B-4") == ["4x4"]
    with pytest.raises(ValueError, match=r"512x512 has 65793 tokens; max_position_embeddings of the config leaves 256"):
        sizes("unnamed")
    with pytest.raises(ValueError, match="multiple of 4 pixels; got 10"):
        sizes("renamed", sjd={"target_size": 10})
    with pytest.raises(ValueError, match="whole number of pixels; got '8x8'"):
        sizes("renamed", sjd={"target_size": "8x8"})
    with pytest.raises(ValueError, match="no token '<reserved08808>'"):
        sizes("renamed", sjd={"target_size": 16})
    # a picture of the square needs 21 positions, the tall ones 25
    assert "4x16" not in sizes("renamed", sjd={"target_size": 8}, max_position_embeddings=24)
    with pytest.raises(ValueError, match="size must be one of 8x8, 16x4"):
        family_of(checkpoint).size("512x512")


def test_pixels_of_all_shapes_are_metas(family: ImageFamily, tmp_path: Path) -> None:
    params = write_vqgan(tmp_path)
    for size in family.sizes:
        grammar = family.grammar(size)
        codes = torch.randint(NUM_CODES, (2, *grammar.grid), generator=torch.Generator().manual_seed(1))
        pixels = family.decode_pixels([grammar.tokens(one) for one in codes], size)
        assert pixels.shape == (2, size.height, size.width, 3)
        expected = decode_pixels(vq_weights(), codes, params).clamp(-1, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(pixels / 255 * 2 - 1 - expected).max() < 2 / 255 + 1e-3
        given = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
        assert family.encode_pixels(given, size).shape == grammar.grid
    tokens = family.grammar(TALL).tokens(codes[0])
    assert family.decode_pixels([tokens[:6]], TALL).shape == (1, 4, 4, 3)


def test_what_is_wrong_with_the_weights_is_named(checkpoint: Path, tmp_path: Path) -> None:
    assert family_of(checkpoint).problems() == []
    broken = tmp_path / "Lumina-mGPT-7B-8"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.self_attn.k_norm.bias"] = torch.zeros(3, 32)
    del tensors["lm_head.weight"]
    save_file(tensors, broken / "model.safetensors")
    shutil.rmtree(broken / "original_tokenizers")
    problems = family_of(broken).problems()
    assert "the tensor lm_head.weight is missing" in problems
    assert any("k_norm.bias has the shape [3, 32]; the config says [4, 32]" in problem for problem in problems)
    assert any("put vqgan.ckpt and vqgan.yaml into its subfolder tokenizer" in problem for problem in problems)
    assert len(problems) == 3
    (broken / "tokenizer.json").unlink()
    assert any("the tokenizer cannot be used" in problem for problem in family_of(broken).problems())


def test_the_second_lumina_mgpt_is_not_taken_for_the_first(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "Lumina-mGPT-2.0"
    shutil.copytree(checkpoint, path)
    from sjd_vllm.models.lumina_mgpt.family import matches

    assert not matches(path, json.loads((path / "config.json").read_text()))
