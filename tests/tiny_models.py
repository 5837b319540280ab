"""Tiny random checkpoints, so that a test of the engine needs no trained model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sjd_vllm.models.demo.vq import DemoVQ, DemoVQConfig

HEAD_DIM = 32  # the smallest that vLLM's attention on a CPU takes
PAINTER_WORDS = ("a", "red", "blue", "house", "lake", "at", "night")
PAINTER_GRID = 6
PAINTER_CODES = 32


def make_tiny_llama(
    path: str | Path,
    *,
    vocab_size: int = 64,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    max_position_embeddings: int = 512,
    scale: float = 1.0,
) -> Path:
    """Write config.json and model.safetensors of a random float32 Llama, without a tokenizer.

    Args:
        path: folder to write to; made if missing.
        vocab_size: V.
        hidden: width, a multiple of HEAD_DIM.
        layers: number of decoder layers.
        seed: of the weights.
        max_position_embeddings: the longest sequence, prompt included.
        scale: factor on the output layer; above 1 makes the next-token distributions peaked.

    Returns:
        The folder.
    """
    if hidden % HEAD_DIM:
        raise ValueError(f"hidden must be a multiple of {HEAD_DIM}; got {hidden}")
    heads = hidden // HEAD_DIM
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        # Far from the tiny 0.02: the next token should depend strongly on the prefix, or a test could not fail.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    model.save_pretrained(path)
    return Path(path)


def make_tiny_painter(path: str | Path, *, max_position_embeddings: int = 128) -> Path:
    """Write a random checkpoint in the layout of the demo model: 36 x 36 pixels, 6 x 6 codes, 43 tokens a picture;
    or its upper 24 rows of pixels.

    Guidance is 2 by default, so that pictures have unconditional companions.
    """
    path = Path(path)
    specials = ["<pad>", "<bos>", "<unk>", "<boi>", "<eol>", "<eoi>"]
    ids = {token: index for index, token in enumerate([*specials, *PAINTER_WORDS])}
    image_token_start = len(ids)
    make_tiny_llama(
        path,
        vocab_size=image_token_start + PAINTER_CODES,
        max_position_embeddings=max_position_embeddings,
        scale=2.0,
    )
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>", eos_token="<eoi>"
    ).save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DemoVQ(DemoVQConfig(num_codes=PAINTER_CODES)).save_pretrained(path / "vq")
    config = json.loads((path / "config.json").read_text())
    config["sjd"] = {
        "family": "demo",
        "image_size": [6 * PAINTER_GRID, 6 * PAINTER_GRID],
        "grid": [PAINTER_GRID, PAINTER_GRID],
        "fewer_rows": [4],
        "image_token_start": image_token_start,
        "num_image_tokens": PAINTER_CODES,
        "eol_token_id": ids["<eol>"],
        "eoi_token_id": ids["<eoi>"],
        "defaults": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 2.0},
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path
