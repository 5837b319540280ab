"""The Emu3 family on tiny random checkpoints in both published layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import Engine, engine
from family_harness import FullLogits, check_greedy_picture, check_law, check_two_ranks, check_window_logits
from safetensors.torch import load_file, save_file
from tiny_emu3 import NUM_CODES, make_converted, make_original, reference_vq
from transformers import Emu3ForConditionalGeneration

from sjd_vllm.models.emu3.family import Emu3Family, picture_grid
from sjd_vllm.models.emu3.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT
from sjd_vllm.models.family import ImageFamily, ImageSize
from sjd_vllm.models.registry import load_family

PROMPT = "a red fox"
SQUARE, WIDE = ImageSize(32, 32), ImageSize(40, 24)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original(tmp_path_factory.mktemp("emu3") / "original")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("emu3") / "converted")


def family_of(path: Path) -> ImageFamily:
    found = load_family(path)
    assert isinstance(found, Emu3Family)
    return found


@pytest.fixture(scope="module")
def family(original: Path) -> ImageFamily:
    return family_of(original)


@pytest.fixture(scope="module")
def reference(converted: Path) -> FullLogits:
    model = Emu3ForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids])).logits[0]

    return logits


@pytest.fixture(scope="module")
def running(original: Path) -> Iterator[Engine]:
    with engine(original, window=8, max_num_seqs=128) as started:
        yield started


def test_logits_of_prompts_and_windows(
    running: Engine, reference: FullLogits, family: ImageFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_window_logits(running, reference, family, SQUARE, PROMPT, monkeypatch)


def test_a_greedy_picture_is_the_references_from_both_layouts_also_on_two_ranks(
    running: Engine, reference: FullLogits, family: ImageFamily, converted: Path
) -> None:
    check_greedy_picture(running, reference, family, SQUARE, PROMPT)
    expected = check_greedy_picture(running, reference, family, WIDE, PROMPT)
    check_two_ranks(converted, family_of(converted), WIDE, PROMPT, expected)


def test_the_law_of_sampled_tokens(running: Engine, reference: FullLogits, family: ImageFamily) -> None:
    check_law(running, reference, family, SQUARE, PROMPT)


@pytest.mark.parametrize("layout", ["original", "converted"])
def test_pixels_and_codes_are_those_of_the_published_autoencoder(layout: str, request: pytest.FixtureRequest) -> None:
    family = family_of(request.getfixturevalue(layout))
    vq, grammar = reference_vq(), family.grammar(WIDE)
    codes = torch.randint(0, NUM_CODES, (3, 3, 5), generator=torch.Generator().manual_seed(0))
    expected = vq.decode(codes)
    got = family._vq.decode(codes)  # type: ignore[attr-defined]
    assert float((got - expected).abs().max()) < 1e-4 * max(1, float(expected.abs().max()))
    in_bytes = ((expected + 1) * 127.5).clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
    pixels = family.decode_pixels([grammar.tokens(one) for one in codes], WIDE)
    assert pixels.shape == (3, 24, 40, 3)
    assert np.abs(pixels.astype(int) - in_bytes).max() <= 1
    assert family.encode_pixels(pixels[0], WIDE).tolist() == vq.encode(_scaled(pixels[0]))[0].tolist()
    assert len(family.encode_pixels(pixels[0], WIDE).unique()) > 1
    rows = family.decode_pixels([grammar.tokens(one[:2]) for one in codes], WIDE)
    assert rows.shape == (3, 16, 40, 3)


def _scaled(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 127.5 - 1


def test_prompts_are_the_authors_in_both_layouts(original: Path, converted: Path) -> None:
    config = json.loads((original / "config.json").read_text())
    size_and_codes = [config["boi_token_id"], *b"3*5", config["img_token_id"]]
    for family in (family_of(original), family_of(converted)):
        expected = [config["bos_token_id"], *(PROMPT + POSITIVE_PROMPT).encode(), *size_and_codes]
        assert family.prompt_token_ids(PROMPT, WIDE) == expected
        expected = [config["bos_token_id"], *NEGATIVE_PROMPT.encode(), *size_and_codes]
        assert family.negative_prompt_token_ids(None, WIDE) == expected
        spelled = family.prompt_token_ids("<|image start|>", WIDE)
        assert spelled.count(config["boi_token_id"]) == 1, "a prompt cannot open a picture of its own"


def test_rows_and_pictures_end_by_forced_ids(original: Path, converted: Path) -> None:
    config = json.loads((original / "config.json").read_text())
    for family in (family_of(original), family_of(converted)):
        grammar = family.grammar(WIDE)
        first = config["eoi_token_id"] + 1
        row = [[[first, first + NUM_CODES]]] * 5 + [[[config["eol_token_id"], config["eol_token_id"] + 1]]]
        end = [[[config[f"{name}_token_id"], config[f"{name}_token_id"] + 1]] for name in ("eof", "eoi", "eos")]
        assert grammar.legal_token_ranges() == row * 3 + end
        assert grammar is family.grammar(WIDE)


def test_sizes_are_the_authors_rounding(family: ImageFamily) -> None:
    assert picture_grid((1, 1), 720 * 720, 8) == (90, 90)
    assert picture_grid((16, 9), 720 * 720, 8) == (68, 120)
    assert family.sizes[0] == SQUARE
    assert family.size("40x24") == WIDE
    with pytest.raises(ValueError, match="size must be one of 32x32, 40x24"):
        family.size("33x32")


def test_the_published_figures(tmp_path: Path) -> None:
    """Of a config that says its type alone, so that every default is the release's."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Emu3", "eos_token_id": 151850}))
    family = family_of(tmp_path)
    assert [str(size) for size in family.sizes[:2]] == ["720x720", "832x624"]
    assert "512x512" in map(str, family.sizes)
    grammar = family.grammar(family.sizes[0])
    assert grammar.num_tokens == 90 * 91 + 3
    assert grammar.legal_token_ranges()[0] == [[151854, 184622]]
    assert grammar.token_ids[-1] == 184621
    assert (family.shape.num_layers, family.shape.num_kv_heads, family.shape.head_dim) == (32, 8, 128)
    assert family.problems() == ["there are no weights (*.safetensors or *.bin)"]


@pytest.mark.parametrize("make", [make_original, make_converted])
def test_problems_name_each_tensor(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "checkpoint")
    assert family_of(path).problems() == []
    weights, expected = _damaged(load_file(path / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert set(family_of(path).problems()) == expected


def test_the_names_of_newer_conversions_load_too(running: Engine, converted: Path, tmp_path: Path) -> None:
    """Transformers' converter of today writes model.text_model.*, model.vqmodel.* and lm_head."""
    path = shutil.copytree(converted, tmp_path / "newer")
    newer = {
        name.replace("text_model.lm_head.", "lm_head.")
        .replace("text_model.model.", "model.text_model.")
        .replace("vqmodel.", "model.vqmodel."): tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    save_file(newer, path / "model.safetensors", metadata={"format": "pt"})
    assert family_of(path).problems() == []
    loaded = running.runner.model.load_weights(iter(newer.items()))
    assert loaded == set(dict(running.runner.model.named_parameters()))
    codes = torch.randint(0, NUM_CODES, (1, 3, 5), generator=torch.Generator().manual_seed(2))
    pixels = family_of(path)._vq.decode(codes)  # type: ignore[attr-defined]
    assert float((pixels - reference_vq().decode(codes)).abs().max()) < 1e-4


def test_loading_names_each_tensor(running: Engine, original: Path, converted: Path) -> None:
    """Also of the merged parameters, whose other parts are there."""
    for path in (original, converted):
        whole = load_file(path / "model.safetensors")
        running.runner.model.load_weights(iter(whole.items()))
        weights, expected = _damaged(whole)
        with pytest.raises(ValueError, match="the weights do not fit the config") as raised:
            running.runner.model.load_weights(iter(weights.items()))
        assert all(line in str(raised.value) for line in expected)


def _damaged(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The weights with one tensor missing, one cut, one too many; and what must be said of them."""
    missing = next(name for name in weights if name.endswith("layers.1.self_attn.k_proj.weight"))
    misshapen = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    out = {name: tensor for name, tensor in weights.items() if name != missing}
    out[misshapen] = out[misshapen][:-1].clone()
    out["model.extra.weight"] = torch.zeros(1)
    return out, {
        "the tensor model.extra.weight is not known",
        f"the tensor {missing} is missing",
        f"the tensor {misshapen} has the shape [95, 128]; the config says [96, 128]",
    }


def test_a_missing_vision_tokenizer_is_named_with_its_place(original: Path, tmp_path: Path) -> None:
    path = shutil.copytree(original, tmp_path / "without")
    shutil.rmtree(path / "vision_tokenizer")
    (path / "emu3.tiktoken").unlink()
    place, tokenizer = family_of(path).problems()
    assert str(path / "vision_tokenizer") in place
    assert "BAAI/Emu3-VisionTokenizer" in place
    assert "emu3.tiktoken" in tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "two"}, "cannot be understood"),
        ({"eoi_token_id": 400}, "ids of codes"),
        ({"image_area": 4}, "no picture fits"),
        ({"image_area": 1 << 24, "max_position_embeddings": 32}, "no picture fits"),
    ],
)
def test_a_bad_config_says_what_is_wrong(original: Path, tmp_path: Path, change: dict, message: str) -> None:
    path = shutil.copytree(original, tmp_path / "bad")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_family(path)
