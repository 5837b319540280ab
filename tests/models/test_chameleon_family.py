"""Chameleon and Anole on tiny random checkpoints of both published layouts."""

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
from reference_chameleon import MetaReference, decode_pixels
from safetensors.torch import load_file, save_file
from tiny_chameleon import (
    NUM_CODES,
    letters,
    make_model,
    reference_of,
    vocabulary,
    vq_weights,
    write_anole,
    write_original,
    write_vqgan,
)

from sjd_vllm.models.chameleon.prompts import code_ids
from sjd_vllm.models.chameleon.vq import ChameleonVQ, vq_shape
from sjd_vllm.models.chameleon.weights import read_original
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.registry import load_family

PROMPT = "a red house"
LARGE = {"heads": 4, "kv_heads": 2, "swin_norm": True, "ranks": 2}  # what the 30B model has in small


def family_of(path: Path) -> ImageFamily:
    found = load_family(path)
    assert found is not None
    assert found.name == "chameleon"
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_anole(tmp_path_factory.mktemp("chameleon") / "Anole-7b-v0.1-hf", make_model())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("chameleon") / "Anole-7b-v0.1")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("chameleon") / "large", **LARGE)


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> ImageFamily:
    return family_of(checkpoint)


@pytest.fixture(scope="module")
def reference() -> FullLogits:
    logits: FullLogits = reference_of(make_model())
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


def test_metas_layout_of_the_large_model(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms behind the blocks, grouped queries, a norm of heads for each of two ranks; on one and two ranks of ours."""
    family, reference = family_of(large), MetaReference(large / "models" / "7b")
    with engine(large, window=8) as running:
        check_window_logits(running, reference, family, family.sizes[0], PROMPT, monkeypatch)
        expected = check_greedy_picture(running, reference, family, family.sizes[0], PROMPT)
    check_two_ranks(large, family, family.sizes[0], PROMPT, expected)


@pytest.mark.parametrize("size", ["small", "large"])
def test_metas_tensors_turned_into_the_conversions(size: str, original: Path, large: Path) -> None:
    """Transformers' model with the converted tensors computes what Meta's does with its own."""
    path, sizes = (original, {}) if size == "small" else (large, LARGE)
    family: Any = family_of(path)
    model = make_model(**sizes)
    weights = model.state_dict()
    for name, tensor in read_original(family._config, path / "models" / "7b"):
        weights[name].copy_(tensor.repeat_interleave(len(weights[name]) // len(tensor), 0))
    tokens = torch.randint(len(vocabulary()), (40,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = MetaReference(path / "models" / "7b")(tokens)
    assert float(expected.std()) > 0.5
    assert float((reference_of(model)(tokens) - expected).abs().max()) < 1e-4


def test_prompts(family: ImageFamily, original: Path) -> None:
    ids = vocabulary()
    for one in (family, family_of(original)):
        size = one.sizes[0]
        assert one.prompt_token_ids(PROMPT, size) == [
            ids[token] for token in ("<s>", "a", "red", "house", "<reserved08706>", "<racm3:break>")
        ]
        assert one.negative_prompt_token_ids(None, size) == [ids["<s>"], ids["<racm3:break>"]]
        assert one.negative_prompt_token_ids("lake", size) == one.prompt_token_ids("lake", size)
    assert family.engine_args == {}
    assert family_of(original).engine_args == {"config_format": "sjd_chameleon", "skip_tokenizer_init": True}
    assert family.defaults.temperature == 0.7
    assert family.defaults.top_p == 0.9


def test_tokens_stand_for_the_codes_in_their_names(family: ImageFamily) -> None:
    size = family.sizes[0]
    codes = torch.arange(36).view(6, 6) % NUM_CODES
    tokens = family.grammar(size).tokens(codes)
    assert tokens == [vocabulary()[letters(int(code))] for code in codes.flatten()]
    assert torch.equal(family.grammar(size).codes(tokens), codes)
    assert vocabulary()["IMGIMGBAZ"] == tokens[10]
    with pytest.raises(ValueError, match=r"'IMGIMGBXZ' names no code"):
        code_ids({"IMGIMGBXZ": 4})
    with pytest.raises(ValueError, match="2 image tokens that do not count from 0"):
        code_ids({"IMGIMGAZ": 4, "IMGIMGCZ": 5})


@pytest.mark.parametrize("layout", ["converted", "original"])
def test_pixels_are_the_references(layout: str, family: ImageFamily, original: Path, tmp_path: Path) -> None:
    """Batches, single pictures and their first rows."""
    own: Any = family if layout == "converted" else family_of(original)
    size, grammar = own.sizes[0], own.grammar(own.sizes[0])
    codes = torch.randint(NUM_CODES, (5, *grammar.grid), generator=torch.Generator().manual_seed(1))
    expected = decode_pixels(vq_weights(), codes, write_vqgan(tmp_path))
    decoded = own._vq.decode(codes)
    assert float((decoded - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
    pixels = own.decode_pixels([grammar.tokens(one) for one in codes], size)
    assert pixels.shape == (5, 12, 12, 3)
    clipped = (np.clip(decoded.permute(0, 2, 3, 1).numpy(), -1, 1) + 1) / 2
    assert np.array_equal(pixels, (clipped * 255).astype(np.uint8))
    assert len(np.unique(pixels)) > 50
    rows = own.decode_pixels([grammar.tokens(codes[0])[:18]], size)
    top = decode_pixels(vq_weights(), codes[:1, :3], write_vqgan(tmp_path))
    assert rows.shape == (1, 6, 12, 3)
    assert np.abs(rows / 255 * 2 - 1 - top.clamp(-1, 1).permute(0, 2, 3, 1).numpy()).max() < 2 / 255 + 1e-3


def test_pixels_in_slices_and_with_attention_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`attn_resolutions`, which the published one leaves empty."""
    family: Any = family_of(write_original(tmp_path / "attention"))
    params = write_vqgan(tmp_path / "attention" / "tokenizer", attn_resolutions=(6,))
    vq = ChameleonVQ.from_checkpoint(family.path, vq_shape(family.path, family._config))
    codes = torch.randint(NUM_CODES, (3, 6, 6), generator=torch.Generator().manual_seed(1))
    expected = decode_pixels(vq_weights((6,)), codes, params)
    assert float((vq.decode(codes) - expected).abs().max()) < 1e-4
    monkeypatch.setattr("sjd_vllm.models.chameleon.vq._PIXELS_AT_ONCE", 300)
    assert float((vq.decode(codes) - expected).abs().max()) < 1e-4


def test_encoded_pixels_are_transformers_codes(family: ImageFamily) -> None:
    size = family.sizes[0]
    pixels = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    vq = make_model().model.vqmodel
    scaled = torch.from_numpy(pixels / 255 * 2 - 1).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        expected = vq.encode(scaled).image_tokens.view(6, 6)
    codes = family.encode_pixels(pixels, size)
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > 3
    assert family.decode_pixels([family.grammar(size).tokens(codes)], size).shape == (1, 12, 12, 3)


def test_what_is_wrong_with_the_weights_is_named(checkpoint: Path, tmp_path: Path) -> None:
    assert family_of(checkpoint).problems() == []
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    files = sorted(broken.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in [*files, broken / "model.safetensors.index.json"]:
        file.unlink()
    del tensors["model.layers.1.self_attn.v_proj.weight"], tensors["model.vqmodel.decoder.conv_in.bias"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(3, 32)
    tensors["model.layers.7.extra"] = torch.zeros(1)
    save_file(tensors, broken / "model.safetensors")
    expected = [
        "the tensor model.layers.1.self_attn.v_proj.weight is missing",
        "the tensor model.layers.0.self_attn.q_norm.weight has the shape [3, 32]; the config says [2, 32]",
        "the tensor model.layers.7.extra is not known",
        "the tensor decoder.conv_in.bias is missing",
    ]
    assert sorted(family_of(broken).problems()) == sorted(expected)
    with pytest.raises(
        ValueError, match=r"v_proj\.weight is missing.*q_norm\.weight has the shape.*7\.extra is not known"
    ):
        engine(broken).__enter__()
    (broken / "model.safetensors").unlink()
    assert family_of(broken).problems() == ["there are no weights (*.safetensors or *.bin)"]


def test_a_missing_pixel_decoder_is_named_with_its_place(checkpoint: Path, tmp_path: Path) -> None:
    """facebook/chameleon-7b has the encoder alone; Meta's file in a subfolder makes up for it."""
    folder = tmp_path / "chameleon-7b"
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if ".vqmodel.decoder." not in name}
        save_file(kept, file)
    family = family_of(folder)
    (problem,) = family.problems()
    assert "the pixel decoder is missing: put vqgan.ckpt and vqgan.yaml into its subfolder tokenizer" in problem
    with pytest.raises(ValueError, match="Alpha-VLLM/Chameleon_7B_mGPT"):
        family.decode_pixels(
            [family.grammar(family.sizes[0]).tokens(torch.zeros(6, 6, dtype=torch.long))], family.sizes[0]
        )
    write_vqgan(folder / "tokenizer")
    assert family_of(folder).problems() == []


def test_what_is_wrong_with_metas_files_is_named(large: Path, tmp_path: Path) -> None:
    assert family_of(large).problems() == []
    broken = tmp_path / "broken"
    shutil.copytree(large, broken)
    file = broken / "models" / "7b" / "consolidated.01.pth"
    tensors = torch.load(file, weights_only=True)
    del tensors["layers.0.attention.k_normalization.bias"]
    tensors["output.weight"] = tensors["output.weight"][:-1].clone()
    tensors["extra"] = torch.zeros(1)
    torch.save(tensors, file)
    rows = len(tensors["output.weight"])
    expected = [
        "consolidated.01.pth: the tensor layers.0.attention.k_normalization.bias is missing",
        f"consolidated.01.pth: the tensor output.weight has the shape [{rows}, 128]; the config says [{rows + 1}, 128]",
        "consolidated.01.pth: the tensor extra is not known",
    ]
    assert sorted(family_of(broken).problems()) == sorted(expected)
    with pytest.raises(ValueError, match=r"k_normalization\.bias is missing"):
        engine(broken).__enter__()
    file.unlink()
    assert "has 1 files consolidated*.pth; params.json says model_parallel_size 2" in family_of(broken).problems()[0]


def test_bad_configs_are_refused(checkpoint: Path, original: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    folder = tmp_path / "Anole-bad"
    folder.mkdir()

    def refused(change: dict[str, Any], message: str) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_family(folder)

    refused({"num_attention_heads": 3}, "do not divide")
    refused({"model_parallel_size": 4}, "model_parallel_size 4")
    refused({"attention_bias": True}, "nor biases")
    refused({"hidden_size": "wide"}, "cannot be used")
    refused({"vocab_size": 20}, "image tokens beyond the model's 20 ids")
    refused({"vocabulary_map": {"<s>": 0, "<racm3:break>": 1}}, "0 image tokens")
    refused({"vocabulary_map": {letters(code): code for code in range(5)}}, "no token '<racm3:break>'")
    refused({"vq_config": {**config["vq_config"], "num_embeddings": 25}}, "the codebook has 25")
    refused({"vq_config": {**config["vq_config"], "double_latent": True}}, "single latents")
    refused({"vocabulary_map": None}, "has no tokenizer")
    with pytest.raises(ValueError, match="size must be one of 12x12"):
        family_of(checkpoint).size("512x512")

    two = tmp_path / "two"
    shutil.copytree(original, two)
    shutil.copytree(two / "models" / "7b", two / "models" / "30b")
    with pytest.raises(ValueError, match="several models: models/30b, models/7b"):
        load_family(two)
    shutil.rmtree(two / "models" / "30b")
    (two / "models" / "7b" / "params.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks or garbles a field: 'dim'"):
        load_family(two)
    (two / "models" / "7b" / "params.json").write_text("[")
    with pytest.raises(ValueError, match=r"params\.json cannot be read"):
        load_family(two)
