"""Janus on tiny random checkpoints in both published layouts, against Transformers' model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import Engine, engine, guided, sampling
from family_harness import check_greedy_picture, check_law, check_two_ranks, check_window_logits, picture_params
from safetensors.torch import load_file, save_file
from tiny_janus import BOS, PAD, SMALL_VQ, TEXT_VOCAB, VQ_16, Reference, make_model, write_converted, write_original

from sjd_vllm.images.request import ImageRequest
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.registry import load_family

PROMPT = "a red house at night"


def family_of(path: Path) -> ImageFamily:
    found = load_family(path)
    assert found is not None
    assert found.name == "janus"
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(vq=SMALL_VQ, image_size=12)
    return write_converted(tmp_path_factory.mktemp("janus") / "converted", model)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("janus") / "original", make_model(vq=VQ_16, image_size=64))


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> ImageFamily:
    return family_of(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(make_model(vq=SMALL_VQ, image_size=12), begin_of_image=3)


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Engine]:
    with engine(checkpoint, window=8, max_num_seqs=128) as started:
        yield started


def test_logits_of_prompts_and_windows(
    running: Engine, reference: Reference, family: ImageFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_window_logits(running, reference, family, family.sizes[0], PROMPT, monkeypatch)


def test_a_greedy_picture_is_the_references_also_on_two_ranks(
    running: Engine, reference: Reference, family: ImageFamily, checkpoint: Path
) -> None:
    expected = check_greedy_picture(running, reference, family, family.sizes[0], PROMPT)
    check_two_ranks(checkpoint, family, family.sizes[0], PROMPT, expected)


def test_the_law_of_sampled_tokens(running: Engine, reference: Reference, family: ImageFamily) -> None:
    check_law(running, reference, family, family.sizes[0], PROMPT)


def test_text_and_pictures_in_one_batch(running: Engine, reference: Reference, family: ImageFamily) -> None:
    """Rows of both heads in every step: each request gets what it gets alone."""
    size = family.sizes[0]
    prompt = family.prompt_token_ids(PROMPT, size)
    words = prompt[:-1]  # without <begin_of_image> the model goes on with text
    out: list[int] = []
    while len(out) < 30:
        out.append(int(reference([*words, *out])[-1].argmax()))
    assert max(out) < TEXT_VOCAB
    params = [
        picture_params(family, size, PROMPT, temperature=0),
        sampling(30, temperature=0),
        sampling(30, temperature=0, sjd=guided(2.0, words[:3])),
    ]
    (picture,), (text,), (guided_text,) = running.generate([prompt, words, words], params)
    assert text == out
    assert min(picture) >= TEXT_VOCAB
    assert max(guided_text) < TEXT_VOCAB
    assert picture == running.generate([prompt], params[:1])[0][0]
    running.assert_nothing_left()


def test_the_original_layout_paints_the_same_picture(original: Path, family: ImageFamily) -> None:
    """Its weights are in pytorch_model.bin."""
    family = family_of(original)
    assert family.engine_args == {"config_format": "sjd_janus"}
    reference = Reference(make_model(vq=VQ_16, image_size=64), begin_of_image=3)
    with engine(original, window=8) as running:
        check_greedy_picture(running, reference, family, family.sizes[0], PROMPT)


def test_prompts(family: ImageFamily, original: Path, tmp_path: Path) -> None:
    """bos, the template, begin of image; all that is between is padded in the unconditional prompt."""
    size = family.sizes[0]
    tokens = json.loads((original / "tokenizer.json").read_text())["model"]["vocab"]
    words = [BOS, "<|User|>", ":", "a", "lake", "<|Assistant|>", ":", "<begin_of_image>"]
    prompt = family.prompt_token_ids(" a lake\n", size)
    assert prompt == [tokens[word] for word in words]
    assert family.unconditional_token_ids(prompt, size) == [prompt[0], *[tokens[PAD]] * 6, prompt[-1]]
    (picture,) = ImageRequest("a lake").pictures(family, 256)
    assert picture.prompt_token_ids == prompt
    assert list(picture.sjd.negative_prompt_token_ids) == family.unconditional_token_ids(prompt, size)
    (picture,) = ImageRequest("a lake", negative_prompt="night").pictures(family, 256)
    assert list(picture.sjd.negative_prompt_token_ids) == family.prompt_token_ids("night", size)

    first = write_original(tmp_path / "Janus-1.3B", make_model(vq=VQ_16, image_size=64), is_pro=False)
    tokens = json.loads((first / "tokenizer.json").read_text())["model"]["vocab"]
    words = [BOS, "User", ":", "a", "lake", "Assistant", ":", "<begin_of_image>"]
    assert family_of(first).prompt_token_ids("a lake", size) == [tokens[word] for word in words]


@pytest.mark.parametrize("layout", ["converted", "original"])
def test_pixels_are_transformers(layout: str, family: ImageFamily, checkpoint: Path, original: Path) -> None:
    """Batches, single pictures and their first rows."""
    vq, side, own = (SMALL_VQ, 12, family) if layout == "converted" else (VQ_16, 64, family_of(original))
    model = make_model(vq=vq, image_size=side)
    size, grid = own.sizes[0], own.grammar(own.sizes[0]).grid
    codes = torch.randint(vq["num_embeddings"], (5, *grid), generator=torch.Generator().manual_seed(1))
    tokens = [own.grammar(size).tokens(one) for one in codes]
    with torch.inference_mode():
        expected = model.model.vqmodel.decode(codes.flatten(1))
        mine = own._vq.decode(codes)
    assert float((mine - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
    pixels = own.decode_pixels(tokens, size)
    assert pixels.shape == (5, side, side, 3)
    assert np.array_equal(pixels, np.clip((mine.permute(0, 2, 3, 1).numpy() + 1) / 2 * 255, 0, 255).astype(np.uint8))
    rows = own.decode_pixels([tokens[0][: grid[1] * 2]], size)
    assert rows.shape == (1, side // grid[0] * 2, side, 3)


def test_encoded_pixels_are_the_nearest_codes(family: ImageFamily, checkpoint: Path) -> None:
    size = family.sizes[0]
    pixels = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    vq = make_model(vq=SMALL_VQ, image_size=12).model.vqmodel
    with torch.inference_mode():
        scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = vq.quant_conv(vq.encoder(scaled))[0].permute(1, 2, 0)
        cosines = torch.cosine_similarity(latents[:, :, None], vq.quantize.embedding.weight, dim=-1)
    assert torch.equal(family.encode_pixels(pixels, size), cosines.argmax(-1))


def copied(checkpoint: Path, to: Path) -> Path:
    shutil.copytree(checkpoint, to)
    return to


def test_what_is_wrong_with_the_weights_is_named(checkpoint: Path, original: Path, tmp_path: Path) -> None:
    assert family_of(checkpoint).problems() == []
    assert family_of(original).problems() == []
    broken = copied(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.generation_head.vision_head.bias"]
    tensors["model.generation_embeddings.weight"] = torch.zeros(3, 8)
    tensors["model.vqmodel.decoder.extra"] = torch.zeros(1)
    save_file(tensors, broken / "model.safetensors")
    expected = [
        "the tensor model.generation_head.vision_head.bias is missing",
        "the tensor model.generation_embeddings.weight has the shape [3, 8]; the config says [48, 8]",
        "the tensor model.vqmodel.decoder.extra is not known",
    ]
    assert sorted(family_of(broken).problems()) == sorted(expected)
    with pytest.raises(ValueError, match=r"vision_head\.bias is missing.*generation_embeddings\.weight has the shape"):
        engine(broken).__enter__()
    for file in broken.glob("*.safetensors"):
        file.unlink()
    assert family_of(broken).problems() == ["there are no weights (*.safetensors or *.bin)"]


def test_tied_heads_load_as_the_files_have_them(tmp_path: Path, checkpoint: Path) -> None:
    tied = write_converted(tmp_path / "tied", make_model(vq=SMALL_VQ, image_size=12, is_tied=True))
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    assert family_of(tied).problems() == []
    silent = copied(checkpoint, tmp_path / "silent")
    config = json.loads((silent / "config.json").read_text())
    del config["tie_word_embeddings"]
    (silent / "config.json").write_text(json.dumps(config))
    assert family_of(silent).problems() == []


def test_bad_configs_are_refused(original: Path, tmp_path: Path) -> None:
    config = json.loads((original / "config.json").read_text())

    def refused(change: dict[str, object], message: str) -> None:
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_family(folder)

    refused({"gen_vision_config": {"cls": "VQ-8", "params": {}}}, "must be 'VQ-16'")
    refused({"gen_aligner_config": {"params": {"projector_type": "linear"}}}, "must be 'mlp_gelu'")
    refused({"gen_head_config": {}}, "lacks params")
    refused({"vision_config": {"params": {"image_size": 8}}}, "less than one code")
    without = {key: value for key, value in config.items() if key != "gen_vision_config"}
    folder = tmp_path / "deepseek-vl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(without))
    assert load_family(folder) is None
    with pytest.raises(ValueError, match="size must be one of 64x64"):
        family_of(original).size("512x512")
