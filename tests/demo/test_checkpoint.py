"""The shipped checkpoint: loads by the standard classes, is small, and does what it is for."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sjd_vllm.demo import captions, checkpoint_path, tokens
from sjd_vllm.demo.captions import captioned_scenes
from sjd_vllm.demo.encode import psnr, to_pixels
from sjd_vllm.demo.export import sjd_config
from sjd_vllm.demo.landscapes import render
from sjd_vllm.demo.scorer import Scorer, accuracies
from sjd_vllm.demo.train_decoder import token_losses
from sjd_vllm.models.demo.vq import DemoVQ

FRESH_SEED = 424_242  # of pictures that no training saw


@pytest.fixture(scope="module")
def fresh() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Captions, pixels [64, 3, 96, 96] and labels [64, 7]."""
    scenes, texts = zip(*captioned_scenes(64, FRESH_SEED), strict=True)
    rng = np.random.default_rng(FRESH_SEED)
    pixels = to_pixels(np.stack([render(scene, rng) for scene in scenes]))
    return list(texts), pixels, torch.tensor([scene.labels() for scene in scenes])


@pytest.fixture(scope="module")
def vq() -> DemoVQ:
    return DemoVQ.from_pretrained(checkpoint_path() / "vq")


def test_it_is_small() -> None:
    size = sum(path.stat().st_size for path in checkpoint_path().rglob("*") if path.is_file())
    assert size < 15e6


def test_the_configuration_describes_the_image_tokens() -> None:
    config = json.loads((checkpoint_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == tokens.EOI_ID
    assert config["sjd"] == sjd_config()


def test_it_predicts_fresh_pictures_from_their_captions(fresh, vq) -> None:
    texts, pixels, _ = fresh
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    images = tokens.image_ids(vq.encode(pixels[:8]).numpy())
    with torch.no_grad():
        right = token_losses(model, tokenizer(texts[:8])["input_ids"], images).mean()
        without = token_losses(model, tokenizer([""] * 8)["input_ids"], images).mean()
        wrong = token_losses(model, tokenizer(texts[8:16])["input_ids"], images).mean()
    assert right < 4.0  # nats a token; a uniform guess costs 6.9
    assert right < without < wrong


def test_the_autoencoder_keeps_fresh_pictures(fresh, vq) -> None:
    _, pixels, _ = fresh
    codes = vq.encode(pixels)
    assert codes.shape == (64, 16, 16)
    assert codes.unique().numel() > 512
    assert psnr(vq.decode(codes), pixels) > 26.0


def test_some_rows_decode_like_all_rows(fresh, vq) -> None:
    _, pixels, _ = fresh
    codes = vq.encode(pixels[:2])
    whole = vq.decode(codes)
    for num_rows in (1, 9):
        part = vq.decode(codes[:, :num_rows])
        assert part.shape == (2, 3, 6 * num_rows, 96)
    assert torch.allclose(part[:, :, :6], whole[:, :, :6], atol=1e-3)  # far from the cut nothing changes


def test_the_autoencoder_survives_saving(vq, tmp_path) -> None:
    vq.save_pretrained(tmp_path)
    again = DemoVQ.from_pretrained(tmp_path)
    assert again.config == vq.config
    for name, tensor in vq.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_scorer_reads_fresh_pictures(fresh, vq) -> None:
    _, pixels, labels = fresh
    scorer = Scorer.from_pretrained(checkpoint_path() / "scorer")
    assert accuracies(scorer.classify(pixels), labels)["mean"] > 0.97
    assert accuracies(scorer.classify(vq.decode(vq.encode(pixels))), labels)["mean"] > 0.95
    shuffled = pixels.roll(1, 0)  # a control that must fail: every picture with its neighbour's labels
    assert accuracies(scorer.classify(shuffled), labels)["mean"] < 0.6


def test_captions_are_exported() -> None:
    assert captions(3, seed=0) == captions(3, seed=0)
