"""The Lumina-mGPT 2.0 family on a tiny random checkpoint in the published layout."""

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
from safetensors.torch import load_file, save_file
from tiny_lumina_mgpt2 import IDS, IMAGE_TOKEN_START, NUM_CODES, make_lumina_mgpt2, reference_model, reference_vq

from sjd_vllm.models.family import ImageFamily, ImageSize
from sjd_vllm.models.lumina_mgpt2.config import MOVQ_FILE, MoVQShape, is_lumina_mgpt2, picture_sizes
from sjd_vllm.models.lumina_mgpt2.family import LuminaMGPT2Family
from sjd_vllm.models.lumina_mgpt2.vq import MoVQ
from sjd_vllm.models.registry import load_family

PROMPT = "a red fox"
WIDE = ImageSize(64, 32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lumina_mgpt2(tmp_path_factory.mktemp("lumina_mgpt2") / "checkpoint")


def family_of(path: Path) -> LuminaMGPT2Family:
    found = load_family(path)
    assert isinstance(found, LuminaMGPT2Family)
    return found


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> ImageFamily:
    return family_of(checkpoint)


@pytest.fixture(scope="module")
def reference() -> FullLogits:
    model = reference_model()

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> torch.Tensor:
        # not by the model's own forward, which hides ids of pictures
        return model.lm_head(model.model(torch.tensor([token_ids])).last_hidden_state)[0]

    return logits


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Engine]:
    with engine(checkpoint, window=8, max_num_seqs=128) as started:
        yield started


def test_logits_of_prompts_and_windows(
    running: Engine, reference: FullLogits, family: ImageFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_window_logits(running, reference, family, WIDE, PROMPT, monkeypatch)


def test_a_greedy_picture_is_the_references_also_on_two_ranks(
    running: Engine, reference: FullLogits, family: ImageFamily, checkpoint: Path
) -> None:
    """There are as many groups of norm weights as ranks, so ranks with each other's weights would show."""
    expected = check_greedy_picture(running, reference, family, WIDE, PROMPT)
    check_two_ranks(checkpoint, family, WIDE, PROMPT, expected)


def test_the_law_of_sampled_tokens(running: Engine, reference: FullLogits, family: ImageFamily) -> None:
    check_law(running, reference, family, family.sizes[0], PROMPT)


def test_loading_names_each_tensor(running: Engine, checkpoint: Path) -> None:
    whole = load_file(checkpoint / "model.safetensors")
    running.runner.model.load_weights(iter(whole.items()))
    weights, expected = _damaged(whole)
    with pytest.raises(ValueError, match="the weights do not fit the config") as raised:
        running.runner.model.load_weights(iter(weights.items()))
    assert all(line in str(raised.value) for line in expected)


def test_pixels_and_codes_are_those_of_the_published_autoencoder(family: ImageFamily) -> None:
    vq, grammar = reference_vq(), family.grammar(WIDE)
    codes = torch.randint(0, NUM_CODES, (3, 4, 8), generator=torch.Generator().manual_seed(0))
    expected = vq.decode(codes)
    got = family._vq.decode(codes)  # type: ignore[attr-defined]
    assert float((got - expected).abs().max()) < 1e-4 * max(1, float(expected.abs().max()))
    in_bytes = ((expected + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
    pixels = family.decode_pixels([grammar.tokens(one) for one in codes], WIDE)
    assert pixels.shape == (3, 32, 64, 3)
    assert np.abs(pixels.astype(int) - in_bytes).max() <= 1
    found = family.encode_pixels(pixels[0], WIDE)
    scaled = torch.from_numpy(pixels[0]).movedim(-1, 0)[None].float() / 127.5 - 1
    assert found.tolist() == vq.encode(scaled)[0].tolist()
    assert len(found.unique()) > 1
    rows = family.decode_pixels([grammar.tokens(one[:2]) for one in codes], WIDE)
    assert rows.shape == (3, 16, 64, 3)


def test_decoding_in_slices_changes_nothing(family: ImageFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, NUM_CODES, (3, 4, 8), generator=torch.Generator().manual_seed(1))
    vq = family._vq  # type: ignore[attr-defined]
    together = vq.decode(codes)
    monkeypatch.setattr("sjd_vllm.models.lumina_mgpt2.vq._PIXELS_AT_ONCE", 1)
    assert float((vq.decode(codes) - together).abs().max()) < 1e-5


def test_movq_270m_has_the_published_size() -> None:
    with torch.device("meta"):
        model = MoVQ(MoVQShape())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 265e6 < num_parameters < 275e6


def test_prompts_are_the_authors(family: ImageFamily) -> None:
    size = [IDS["<racm3:break>"], IDS["<reserved08801>"], IDS["<reserved08802>"]]
    text = f"Generate an image of 64x32 according to the following prompt:\n{PROMPT}"
    expected = [IDS["<|im_end|>"], *text.encode(), IDS["<reserved08706>"], *size]
    assert family.prompt_token_ids(PROMPT, WIDE) == expected
    assert family.negative_prompt_token_ids(None, WIDE) == size
    assert family.negative_prompt_token_ids("blurry", WIDE) == family.prompt_token_ids("blurry", WIDE)
    assert family.prompt_token_ids("<racm3:break>", WIDE).count(size[0]) == 1, "a prompt cannot open a picture"


def test_rows_and_pictures_end_by_forced_ids(family: ImageFamily) -> None:
    row = [[[IMAGE_TOKEN_START, IMAGE_TOKEN_START + NUM_CODES]]] * 8
    row += [[[IDS["<reserved08799>"], IDS["<reserved08799>"] + 1]]]
    end = [[[IDS["<eoss>"], IDS["<eoss>"] + 1]]]
    assert family.grammar(WIDE).legal_token_ranges() == row * 4 + end


def test_sizes_are_the_authors_list(family: ImageFamily) -> None:
    published = picture_sizes(768, 32)
    assert (768, 768) in published
    assert (1536, 384) in published
    assert all(width * height <= 768 * 768 for width, height in published)
    assert family.sizes[0] == ImageSize(64, 64)
    with pytest.raises(ValueError, match="size must be one of 64x64, 128x32"):
        family.size("65x64")


def test_a_published_config_is_known_by_its_vocabulary() -> None:
    config = {"model_type": "chameleon", "vocab_size": 171520}
    assert is_lumina_mgpt2(config)
    assert not is_lumina_mgpt2({**config, "vocab_size": 65536}), "Chameleon and Lumina-mGPT 1"
    assert not is_lumina_mgpt2({**config, "model_type": "llama"})


def test_problems_name_each_tensor(checkpoint: Path, tmp_path: Path) -> None:
    assert family_of(checkpoint).problems() == []
    path = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights, expected = _damaged(load_file(path / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    movq = torch.load(path / MOVQ_FILE, weights_only=True)
    del movq["decoder.up.2.block.0.norm1.conv_y.weight"]
    movq["ema_decoder.convinweight"] = torch.zeros(1)  # as training leaves them
    torch.save(movq, path / MOVQ_FILE)
    missing = "the tensor decoder.up.2.block.0.norm1.conv_y.weight is missing"
    assert set(family_of(path).problems()) == {*expected, f"{MOVQ_FILE}: {missing}"}
    with pytest.raises(ValueError, match=missing):
        _ = family_of(path)._vq


def test_missing_files_are_named_with_their_place(checkpoint: Path, tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "without")
    (path / MOVQ_FILE).unlink()
    (path / "tokenizer.json").unlink()
    decoder, tokenizer = family_of(path).problems()
    assert str(path / MOVQ_FILE) in decoder
    assert "ai-forever/MoVQGAN" in decoder
    assert "tokenizer.json" in tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"swin_norm": True}, "swin_norm"),
        ({"vocab_size": 280}, "the vocabulary ends at 280"),
        ({"model_parallel_size": 3}, "multiple of model_parallel_size"),
        ({"max_position_embeddings": 16}, "no picture fits"),
    ],
)
def test_a_bad_config_says_what_is_wrong(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "bad")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_family(path)


def _damaged(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The weights with one tensor missing, one cut, one too many; and what must be said of them."""
    missing, misshapen = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.q_norm.bias"
    out = {name: tensor for name, tensor in weights.items() if name != missing}
    out[misshapen] = out[misshapen][:-1].clone()
    out["model.extra.weight"] = torch.zeros(1)
    return out, {
        "the tensor model.extra.weight is not known",
        f"the tensor {missing} is missing",
        f"the tensor {misshapen} has the shape [1, 32]; the config says [2, 32]",
    }
