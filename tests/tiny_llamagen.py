"""Tiny random LlamaGen checkpoints in the published layouts, names and shapes written out here, not taken from the code
under test.

The layouts: the release's files, with the tensors under "model", "module" or nothing, and config.json with
model.safetensors as huggingface_hub's mixin, by which the authors upload (gpt_hf.py), writes a `ModelArgs`.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

NUM_CODES = 48
GRID = 6
DIM = 128  # two heads of 64, as in all of the release but 3B
NUM_HEADS = 2
FFN_DIM = 192
NUM_LAYERS = 2
NUM_CLASSES = 10
CAPTION_ROWS = 120
CAPTION_DIM = 24
WORDS = ("a", "red", "blue", "house", "lake", "at", "night")

Tensors = dict[str, Tensor]


@dataclass
class ModelArgs:
    """The authors' (autoregressive/models/gpt.py)."""

    dim: int = 4096
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0
    num_classes: int = 1000
    caption_dim: int = 2048
    class_dropout_prob: float = 0.1
    model_type: str = "c2i"
    vocab_size: int = 16384
    cls_token_num: int = 1
    block_size: int = 256
    max_batch_size: int = 32
    max_seq_len: int = 2048


class Uploaded(nn.Module, PyTorchModelHubMixin):
    """A model as the mixin sees the authors': made of a `ModelArgs` called config, with some tensors."""

    def __init__(self, config: ModelArgs, tensors: Tensors) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Tensors:  # type: ignore[override]
        return dict(self.tensors)


def make_tiny_llamagen(
    path: Path,
    kind: str = "c2i",
    *,
    wrapper: str | None = "model",
    num_classes: int = NUM_CLASSES,
    num_heads: int = NUM_HEADS,
    dim: int = DIM,
    as_mixin: bool = False,
) -> Path:
    """Write a checkpoint of 96 x 96 pixels, 6 x 6 codes; returns its folder.

    Args:
        kind: "c2i" or "t2i".
        wrapper: the key that the tensors stand under; None for none.
        num_classes: of c2i.
        num_heads, dim: of the transformer; without a config the heads have 64 numbers.
        as_mixin: config.json and model.safetensors in place of the release's file.
    """
    path.mkdir(parents=True)
    tensors = transformer_tensors(kind, num_classes=num_classes, dim=dim)
    if as_mixin:
        config = ModelArgs(
            model_type=kind,
            dim=dim,
            n_layer=NUM_LAYERS,
            n_head=num_heads,
            vocab_size=NUM_CODES,
            block_size=GRID * GRID,
            num_classes=num_classes,
            cls_token_num=CAPTION_ROWS if kind == "t2i" else 1,
        )
        Uploaded(config, tensors).save_pretrained(path)
    else:
        name = "c2i_B_96.pt" if kind == "c2i" else "t2i_XL_stage1_96.pt"
        # as training leaves it: other things beside the tensors
        content = tensors if wrapper is None else {wrapper: tensors, "steps": 5, "args": Namespace(gpt_model="GPT-B")}
        torch.save(content, path / name)
    torch.save({"model": vq_tensors()}, path / f"vq_ds16_{kind}.pt")
    if kind == "t2i":
        write_tiny_t5(path / "flan-t5-xl")
    return path


def transformer_tensors(kind: str, *, num_classes: int = NUM_CLASSES, dim: int = DIM, seed: int = 0) -> Tensors:
    """Random weights whose next token depends strongly on the prefix and on the prompt."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    out: Tensors = {
        "tok_embeddings.weight": random(NUM_CODES, dim, scale=1.0),
        "norm.weight": 1 + random(dim),
        "output.weight": random(NUM_CODES, dim),
    }
    if kind == "t2i":
        out["cls_embedding.cap_proj.fc1.weight"] = random(dim, CAPTION_DIM)
        out["cls_embedding.cap_proj.fc2.weight"] = random(dim, dim, scale=0.4)
        out["cls_embedding.uncond_embedding"] = random(CAPTION_ROWS, CAPTION_DIM, scale=1.0)
    else:
        out["cls_embedding.embedding_table.weight"] = random(num_classes + 1, dim, scale=1.0)
    for index in range(NUM_LAYERS):
        layer = f"layers.{index}."
        out[layer + "attention.wqkv.weight"] = random(3 * dim, dim)
        out[layer + "attention.wo.weight"] = random(dim, dim)
        out[layer + "feed_forward.w1.weight"] = random(FFN_DIM, dim)
        out[layer + "feed_forward.w3.weight"] = random(FFN_DIM, dim)
        out[layer + "feed_forward.w2.weight"] = random(dim, FFN_DIM)
        out[layer + "attention_norm.weight"] = 1 + random(dim)
        out[layer + "ffn_norm.weight"] = 1 + random(dim)
    return out


def vq_tensors(
    *, levels: tuple[int, ...] = (1, 1, 2, 2, 4), base: int = 32, latent: int = 32, seed: int = 1
) -> Tensors:
    """A pixel decoder and encoder with the channel multiples of VQ-16 (or VQ-8: 1, 2, 2, 4), two blocks a level."""
    generator = torch.Generator().manual_seed(seed)
    out: Tensors = {}

    def random(*shape: int) -> Tensor:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        return torch.randn(*shape, generator=generator) / fan_in**0.5

    def conv(name: str, channels_in: int, channels: int, side: int) -> None:
        out[name + ".weight"] = random(channels, channels_in, side, side)
        out[name + ".bias"] = 0.1 * random(channels)

    def norm(name: str, channels: int) -> None:
        out[name + ".weight"] = 1 + 0.2 * random(channels)
        out[name + ".bias"] = 0.2 * random(channels)

    def residual(name: str, channels_in: int, channels: int) -> None:
        norm(name + ".norm1", channels_in)
        conv(name + ".conv1", channels_in, channels, 3)
        norm(name + ".norm2", channels)
        conv(name + ".conv2", channels, channels, 3)
        if channels_in != channels:
            conv(name + ".nin_shortcut", channels_in, channels, 1)

    def attention(name: str, channels: int) -> None:
        norm(name + ".norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(part: str, channels: int) -> None:
        residual(part + ".mid.0", channels, channels)
        attention(part + ".mid.1", channels)
        residual(part + ".mid.2", channels, channels)

    last = len(levels) - 1
    conv("encoder.conv_in", 3, base, 3)
    channels = base
    for level, multiple in enumerate(levels):
        for block in range(2):
            residual(f"encoder.conv_blocks.{level}.res.{block}", channels, base * multiple)
            channels = base * multiple
            if level == last:
                attention(f"encoder.conv_blocks.{level}.attn.{block}", channels)
        if level != last:
            conv(f"encoder.conv_blocks.{level}.downsample.conv", channels, channels, 3)
    middle("encoder", channels)
    norm("encoder.norm_out", channels)
    conv("encoder.conv_out", channels, latent, 3)
    conv("decoder.conv_in", latent, channels, 3)
    middle("decoder", channels)
    for level, multiple in enumerate(reversed(levels)):
        for block in range(3):
            residual(f"decoder.conv_blocks.{level}.res.{block}", channels, base * multiple)
            channels = base * multiple
            if level == 0:
                attention(f"decoder.conv_blocks.{level}.attn.{block}", channels)
        if level != last:
            conv(f"decoder.conv_blocks.{level}.upsample.conv", channels, channels, 3)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", channels, 3, 3)
    out["quantize.embedding.weight"] = random(NUM_CODES, 8)
    out["quantize.codebook_used"] = torch.zeros(64)
    conv("quant_conv", latent, 8, 1)
    conv("post_quant_conv", 8, latent, 1)
    return out


def write_tiny_t5(path: Path) -> None:
    """A random T5 encoder and a tokenizer that ends each text with </s>, as T5's does."""
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=16,
        d_model=CAPTION_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        initializer_factor=3.0,
        dropout_rate=0.0,
    )
    T5EncoderModel(config).save_pretrained(path)
    ids = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
