"""SimpleAR on a tiny random checkpoint, against Transformers' Qwen2 and a rendering of the Cosmos video decoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import Engine, engine
from family_harness import FullLogits, check_greedy_picture, check_law, check_two_ranks, check_window_logits
from reference_simplear import ReferenceDecoder
from safetensors.torch import load_file, save_file
from tiny_simplear import LEVELS, VOCABULARY, make_decoder, make_tiny_simplear
from transformers import Qwen2ForCausalLM

from sjd_vllm.config import ConfigError
from sjd_vllm.images.request import ImageRequest
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.registry import load_family
from sjd_vllm.models.simplear.vq import CosmosDecoder, CosmosShape

PROMPT = "red house at night"


def family_of(path: Path) -> ImageFamily:
    found = load_family(path)
    assert found is not None
    assert found.name == "simplear"
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_simplear(tmp_path_factory.mktemp("families") / "simplear")


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> ImageFamily:
    return family_of(checkpoint)


@pytest.fixture(scope="module")
def decoder() -> ReferenceDecoder:
    return make_decoder()


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> FullLogits:
    model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

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


def test_prompts(family: ImageFamily) -> None:
    """As the authors' generate.py has them, in a tokenizer of bytes."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    size = family.sizes[0]

    def expected(text: str) -> list[int]:
        return [ids["<|t2i|>"], *[ids[character] for character in text.replace(" ", "\u0120")], ids["<|soi|>"]]

    assert family.prompt_token_ids("red house", size) == expected("A highly realistic image of red house")
    assert family.negative_prompt_token_ids("night", size) == expected("An image of night")
    assert family.negative_prompt_token_ids(None, size) == expected(
        "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
        "bad eyes, bad limbs, distortion"
    )


def test_sizes_are_those_that_fit(family: ImageFamily, checkpoint: Path, tmp_path: Path) -> None:
    assert [str(size) for size in family.sizes] == ["256x256"]
    roomy = copied(checkpoint, tmp_path / "roomy", max_position_embeddings=32768)
    assert [str(size) for size in family_of(roomy).sizes] == ["1024x1024", "768x768", "512x512", "256x256"]
    with pytest.raises(ValueError, match="size must be one of 256x256"):
        family.size("1024x1024")


def test_pixels_are_the_video_decoders(family: ImageFamily, decoder: ReferenceDecoder) -> None:
    """One frame of it, for batches, single pictures and their first rows; the published file is a trace of it."""
    size = family.sizes[0]
    codes = torch.randint(48, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    tokens = [family.grammar(size).tokens(one) for one in codes]
    with torch.inference_mode():
        expected = decoder(codes[:, None])
    assert expected.shape == (2, 3, 1, 256, 256)
    mine = family._decoder.decode(codes)
    scale = max(1.0, float(expected.abs().max()))
    assert float((mine - expected[:, :, 0]).abs().max()) < 1e-4 * scale
    pixels = family.decode_pixels(tokens, size)
    rounded = (expected[:, :, 0].clamp(-1, 1) + 1) * 127.5
    assert np.abs(pixels - rounded.permute(0, 2, 3, 1).numpy()).max() < 0.51
    assert family.decode_pixels([tokens[0][:48]], size).shape == (1, 48, 256, 3)


def test_the_reference_decodes_videos(decoder: ReferenceDecoder) -> None:
    """It is causal: a first frame does not know of later ones. So one frame is the general decoder's first."""
    codes = torch.randint(48, (1, 2, 4, 4), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        video, frame = decoder(codes), decoder(codes[:, :1])
    assert video.shape == (1, 3, 9, 64, 64)
    assert torch.allclose(video[:, :, :1], frame, atol=1e-4 * float(frame.abs().max()))


def test_vectors_of_codes_are_finite_scalar_quantisation() -> None:
    """Digits in the bases of the levels, the first the fastest, centred."""
    model = CosmosDecoder(CosmosShape(levels=LEVELS, channels=8))
    assert model.vectors(torch.tensor([0, 1, 4, 47])).tolist() == [
        [-1, -1, -1],
        [-0.5, -1, -1],
        [-1, -0.5, -1],
        [0.5, 0.5, 1],
    ]
    assert CosmosShape().num_codes == 64000


def copied(checkpoint: Path, to: Path, **changes: object) -> Path:
    shutil.copytree(checkpoint, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def test_what_is_wrong_with_the_checkpoint_is_named(family: ImageFamily, checkpoint: Path, tmp_path: Path) -> None:
    assert family.problems() == []
    broken = copied(checkpoint, tmp_path / "broken")
    decoder_file = broken / "Cosmos-1.0-Tokenizer-DV8x16x16" / "decoder.jit"
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(3)
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, broken / "model.safetensors")
    decoder_file.unlink()
    missing = (
        f"the pixel decoder {decoder_file} is missing: download nvidia/Cosmos-1.0-Tokenizer-DV8x16x16 to that folder"
    )
    assert sorted(family_of(broken).problems()) == sorted(
        [
            "the tensor model.layers.1.mlp.down_proj.weight is missing",
            "the tensor extra is not known",
            "the tensor model.norm.weight has the shape [3]; the config says [64]",
            missing,
        ]
    )
    size = family.sizes[0]
    with pytest.raises(ValueError, match=r"decoder\.jit is missing: download nvidia/"):
        family_of(broken).decode_pixels([family.grammar(size).tokens(torch.zeros(16, 16, dtype=torch.long))], size)

    wide = copied(checkpoint, tmp_path / "wide", sjd={"pixel_decoder": {"levels": LEVELS, "channels": 16}})
    found = family_of(wide).problems()
    assert "post_quant_conv" not in "".join(found)
    assert any(
        line.startswith(
            "Cosmos-1.0-Tokenizer-DV8x16x16: the tensor decoder.up.0.block.0.conv1.0.conv3d.weight has the shape"
        )
        for line in found
    )


@pytest.mark.parametrize(
    ("name", "message"), [("missing", r"down_proj\.weight is missing"), ("surplus", "extra is not known")]
)
def test_an_engine_refuses_other_tensors(checkpoint: Path, tmp_path: Path, name: str, message: str) -> None:
    broken = copied(checkpoint, tmp_path / name)
    tensors = load_file(broken / "model.safetensors")
    if name == "missing":
        del tensors["model.layers.1.mlp.down_proj.weight"]
    else:
        tensors["extra"] = torch.zeros(1)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        engine(broken).__enter__()


def test_bad_configs_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no room for 64000 codes"):
        load_family(copied(checkpoint, tmp_path / "small", sjd={}))
    with pytest.raises(ValueError, match="too few for a picture"):
        load_family(copied(checkpoint, tmp_path / "short", max_position_embeddings=200))
    with pytest.raises(ValueError, match="no pixel decoder has"):
        load_family(copied(checkpoint, tmp_path / "odd", sjd={"pixel_decoder": {"width": 3}}))
    lengthened = copied(checkpoint, tmp_path / "long", vocab_size=320)
    with pytest.raises(ValueError, match=r"the tokenizer has 264 tokens; .* has 272"):
        family_of(lengthened).prompt_token_ids("night", family_of(lengthened).sizes[0])


def test_a_qwen2_with_the_special_tokens_is_one(checkpoint: Path, tmp_path: Path) -> None:
    named = copied(checkpoint, tmp_path / "named", architectures=["Qwen2ForCausalLM"])
    assert family_of(named).name == "simplear"
    plain = copied(checkpoint, tmp_path / "plain", architectures=["Qwen2ForCausalLM"])
    for file in plain.glob("*token*"):
        file.unlink()
    assert load_family(plain) is None


def test_a_picture_to_start_from_is_refused(family: ImageFamily) -> None:
    """There is no encoder; the refusal comes before the file is looked at."""
    with pytest.raises(ConfigError, match="models of the family simplear cannot start from a picture") as raised:
        ImageRequest(PROMPT, init_image=b"any", keep_rows=1).pictures(family, 512)
    assert raised.value.param == "init_image"
