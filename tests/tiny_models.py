"""Tiny random checkpoints, so that a test of the engine needs no trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEAD_DIM = 32  # the smallest that vLLM's attention on a CPU takes


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
