"""What a LlamaGen checkpoint is: its files, and every figure of the model from the shapes of its tensors.

The release has no config. A folder holds

* one transformer, a file of the release under its own name: ``c2i_B_256.pt``, ``c2i_B_384.pt``, ``c2i_L_256.pt``,
  ``c2i_L_384.pt``, ``c2i_XL_384.pt``, ``c2i_XXL_384.pt``, ``c2i_3B_384.pt`` (huggingface.co/FoundationVision/LlamaGen),
  ``t2i_XL_stage1_256.pt`` or ``t2i_XL_stage2_512.pt`` (huggingface.co/peizesun/llamagen_t2i); the number at its end is
  the size of the picture in pixels;
* one pixel decoder: ``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt`` or ``vq_ds16_t2i.pt``, from the same places;
* for text, the folder ``flan-t5-xl`` (huggingface.co/google/flan-t5-xl).

In place of the transformer's file there may be ``model.safetensors`` with the same names and a ``config.json`` with
the fields of the authors' `ModelArgs` (autoregressive/models/gpt.py), as huggingface_hub's mixin, which they upload by
(autoregressive/models/gpt_hf.py), writes a dataclass.

vLLM knows one vocabulary. Ids are, in this order: the codes, then what a prompt is made of, which has a vector but no
score: the class labels with the one that stands for none, or the rows of the learned unconditional caption with the id
that stands where a caption brings a vector of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sjd_vllm.models.tensors import Shape, tensor_shapes

ARCHITECTURE = "LlamaGenForImageGeneration"
CONFIG_FORMAT = "sjd_llamagen"
TEXT_ENCODER = "flan-t5-xl"
KINDS = ("c2i", "t2i")
# Left over from older code, which kept the rotary table among the weights; the authors load without it.
UNUSED = ("freqs_cis",)

# Heads by width cannot be read off the tensors: 64 numbers a head, but in GPT-3B and GPT-7B (gpt.py, "GPT Configs").
_HEAD_DIM = 64
_OTHER_HEAD_DIMS = {3200: 100, 4096: 128}
_VECTOR_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # of heads that vLLM's attention takes
_DOWNLOADS = {"c2i": "huggingface.co/FoundationVision/LlamaGen", "t2i": "huggingface.co/peizesun/llamagen_t2i"}


@dataclass(frozen=True)
class LlamaGenShape:
    """The figures of one checkpoint.

    Attributes:
        kind: "c2i", from a class, or "t2i", from a text.
        dim: width of the transformer.
        num_layers, num_heads, num_kv_heads, head_dim: of the transformer.
        ffn_dim: width of the feed-forward layers.
        num_codes: entries of the codebook.
        num_labels: classes, and one more for none (c2i); 0 for t2i.
        num_caption_rows: rows of the longest caption, 120 (t2i); 0 for c2i.
        caption_dim: width of the text encoder's features (t2i).
        grid: rows, and columns, of codes.
        downsample: pixels a code and side.
        rope_base: of the rotary embedding.
        norm_eps: of the RMS norms.
    """

    kind: str
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    num_codes: int
    num_labels: int
    num_caption_rows: int
    caption_dim: int
    grid: int
    downsample: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def is_text(self) -> bool:
        """Whether prompts are texts."""
        return self.kind == "t2i"

    @property
    def vocab_size(self) -> int:
        """Codes, and the ids that prompts are made of."""
        return self.num_codes + (self.num_caption_rows + 1 if self.is_text else self.num_labels)

    @property
    def caption_id(self) -> int | None:
        """The id that stands where a caption brings its own vector; None for c2i."""
        return self.num_codes + self.num_caption_rows if self.is_text else None

    @property
    def max_positions(self) -> int:
        """Tokens of the longest prompt and of a picture."""
        return max(1, self.num_caption_rows) + self.grid**2

    @property
    def served_head_dim(self) -> int:
        """Numbers a head that vLLM is told; above `head_dim` the heads end with zeros."""
        return next(size for size in (*_VECTOR_SIZES, self.head_dim) if size >= self.head_dim)

    @property
    def image_size(self) -> int:
        """Pixels of a picture's side."""
        return self.grid * self.downsample

    @cached_property
    def tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the transformer."""
        dim = self.dim
        kv_dim = self.num_kv_heads * self.head_dim
        out: dict[str, Shape] = {
            "tok_embeddings.weight": (self.num_codes, dim),
            "norm.weight": (dim,),
            "output.weight": (self.num_codes, dim),
        }
        if self.is_text:
            out["cls_embedding.cap_proj.fc1.weight"] = (dim, self.caption_dim)
            out["cls_embedding.cap_proj.fc2.weight"] = (dim, dim)
            out["cls_embedding.uncond_embedding"] = (self.num_caption_rows, self.caption_dim)
        else:
            out["cls_embedding.embedding_table.weight"] = (self.num_labels, dim)
        for index in range(self.num_layers):
            layer = f"layers.{index}."
            out[layer + "attention.wqkv.weight"] = (dim + 2 * kv_dim, dim)
            out[layer + "attention.wo.weight"] = (dim, dim)
            out[layer + "feed_forward.w1.weight"] = (self.ffn_dim, dim)
            out[layer + "feed_forward.w3.weight"] = (self.ffn_dim, dim)
            out[layer + "feed_forward.w2.weight"] = (dim, self.ffn_dim)
            out[layer + "attention_norm.weight"] = (dim,)
            out[layer + "ffn_norm.weight"] = (dim,)
        return out


def is_llamagen(path: Path, config: Mapping[str, Any]) -> bool:
    """By the name of a file of the release, or by the fields of a `ModelArgs`."""
    return bool(_release_files(path)) or (config.get("model_type") in KINDS and "cls_token_num" in config)


def transformer_file(path: Path) -> Path:
    """The file with the transformer's weights. Raises ValueError where there is none, or more than one."""
    files = _release_files(path)
    if not files and (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"the folder must hold one transformer of LlamaGen, such as c2i_B_256.pt or t2i_XL_stage1_256.pt; found "
            f"{found}. Give each a folder of its own, with its pixel decoder"
        )
    return files[0]


def vq_file(path: Path) -> Path:
    """The file with the pixel decoder. Raises ValueError, saying where it comes from, unless there is one."""
    files = sorted(path.glob("vq_*.pt"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        kind = "t2i" if any(path.glob("t2i_*.pt")) else "c2i"
        raise ValueError(
            f"the folder must hold one pixel decoder, such as vq_ds16_{kind}.pt of {_DOWNLOADS[kind]}; found {found}"
        )
    return files[0]


def llamagen_shape(path: Path, config: Mapping[str, Any]) -> LlamaGenShape:
    """The figures of the checkpoint in a folder, from headers alone. Raises ValueError for what they do not say."""
    file = transformer_file(path)
    shapes = tensor_shapes([file])
    kind = "t2i" if "cls_embedding.uncond_embedding" in shapes else "c2i"
    rows, caption_dim = _need(shapes, "cls_embedding.uncond_embedding", file) if kind == "t2i" else (0, 0)
    labels = 0 if kind == "t2i" else _need(shapes, "cls_embedding.embedding_table.weight", file)[0]
    num_codes, dim = _need(shapes, "tok_embeddings.weight", file)
    head_dim = dim // config["n_head"] if config.get("n_head") else _OTHER_HEAD_DIMS.get(dim, _HEAD_DIM)
    if dim % head_dim or head_dim % 4:
        raise ValueError(
            f"{file.name} is {dim} wide, which is no width of the release; a config.json with n_head must say how many "
            "heads it has, of a multiple of 4 numbers each"
        )
    layers = {int(match[1]) for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    downsample = _downsample(vq_file(path))
    return LlamaGenShape(
        kind=kind,
        dim=dim,
        num_layers=max(layers, default=-1) + 1,
        num_heads=dim // head_dim,
        num_kv_heads=(_need(shapes, "layers.0.attention.wqkv.weight", file)[0] - dim) // (2 * head_dim),
        head_dim=head_dim,
        ffn_dim=_need(shapes, "layers.0.feed_forward.w1.weight", file)[0],
        num_codes=num_codes,
        num_labels=labels,
        num_caption_rows=rows,
        caption_dim=caption_dim,
        grid=_grid(file, config, downsample),
        downsample=downsample,
        rope_base=float(config.get("rope_base", 10000)),
        norm_eps=float(config.get("norm_eps", 1e-5)),
    )


def served_config(path: Path, config: Mapping[str, Any]) -> Any:
    """The LlamaConfig that vLLM is given, with the checkpoint's figures under `llamagen`.

    It says "mrope_section", by which vLLM asks the model for the position of each token, but no rotary embedding of
    vLLM's is ever made from it.
    """
    from dataclasses import asdict

    from transformers import LlamaConfig

    shape = llamagen_shape(path, config)
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.served_head_dim,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=shape.max_positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": shape.rope_base,
            "mrope_section": [shape.served_head_dim // 2],
        },
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        architectures=[ARCHITECTURE],
        dtype=torch.bfloat16,  # the authors' scripts' --precision
        llamagen=asdict(shape),
        weight_file=transformer_file(path).name,
        name_or_path=str(path),
    )


def _release_files(path: Path) -> list[Path]:
    return sorted(file for kind in KINDS for file in path.glob(f"{kind}_*.pt"))


def _need(shapes: Mapping[str, Shape], name: str, file: Path) -> Shape:
    if name not in shapes:
        raise ValueError(f"{file.name} lacks the tensor {name}")
    return shapes[name]


def _downsample(file: Path) -> int:
    """Pixels a code and side: a halving less than the decoder has levels."""
    names = tensor_shapes([file])
    levels = {int(match[1]) for name in names if (match := re.match(r"decoder\.conv_blocks\.(\d+)\.", name))}
    if not levels:
        raise ValueError(f"{file.name} lacks the tensors decoder.conv_blocks.*, so it is no pixel decoder of LlamaGen")
    downsample: int = 2 ** max(levels)
    return downsample


def _grid(file: Path, config: Mapping[str, Any], downsample: int) -> int:
    if config.get("block_size"):
        grid = math.isqrt(config["block_size"])
        if grid * grid != config["block_size"]:
            raise ValueError(f"block_size must be a square number of codes; got {config['block_size']}")
        return grid
    named = re.search(r"_(\d+)\.pt$", file.name)
    if named is None or int(named[1]) < downsample or int(named[1]) % downsample:
        raise ValueError(
            f"{file.name} must end with the pixels of a picture's side, a multiple of {downsample}, as c2i_B_256.pt "
            "does"
        )
    return int(named[1]) // downsample
