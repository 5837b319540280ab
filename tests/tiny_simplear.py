"""A tiny random SimpleAR checkpoint in the published layout, with the decoder.jit of a small Cosmos tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from reference_simplear import ReferenceDecoder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HEAD_DIM = 32
LEVELS = (4, 4, 3)
CHANNELS = 8
SPECIALS = ("<|endoftext|>", "<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>")
VOCABULARY = (SPECIALS[0], *sorted(ByteLevel.alphabet()), *SPECIALS[1:])  # Qwen2's bytes, without its merges


def make_decoder() -> ReferenceDecoder:
    """The same random decoder each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        decoder = ReferenceDecoder(LEVELS, CHANNELS).eval()
        for name, parameter in decoder.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return decoder


def make_tiny_simplear(path: Path, *, architecture: str = "SimpARForCausalLM", is_tied: bool = True) -> Path:
    """Codes 16 x 16 of 256 x 256 pixels, the smallest of the sizes."""
    hidden = 2 * HEAD_DIM
    config = Qwen2Config(
        vocab_size=len(VOCABULARY) + 48,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(config).float()
    model.save_pretrained(path)
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(VOCABULARY[:-7])}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[1:])})
    tokenizer.save_pretrained(path)
    content = json.loads((path / "config.json").read_text())
    content["architectures"] = [architecture]
    content["sjd"] = {"pixel_decoder": {"levels": LEVELS, "channels": CHANNELS}}
    (path / "config.json").write_text(json.dumps(content))
    folder = path / "Cosmos-1.0-Tokenizer-DV8x16x16"
    folder.mkdir()
    with torch.no_grad():
        torch.jit.trace(make_decoder(), torch.zeros(1, 1, 4, 4, dtype=torch.long)).save(folder / "decoder.jit")
    return path
