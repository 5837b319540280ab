"""Tensors of the decoder: names and shapes in both published layouts, and Meta's turned into the conversion's.

Sources: chameleon/inference/transformer.py and loader.py (facebookresearch/chameleon) for Meta's names and how ranks
share the tensors; Transformers' convert_chameleon_weights_to_hf.py for the conversion.

Query-key normalisation scales and shifts each head by itself. A rank of the training had one gain and shift for all of
its heads; a file has a row per rank (Meta's, and conversions of July 2024) or the same repeated, a row per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sjd_vllm.models.accounting import ExactRule
from sjd_vllm.models.llama_weights import llama_shapes
from sjd_vllm.models.tensors import Shape, differences, read_tensors, tensor_shapes

if TYPE_CHECKING:
    from transformers import ChameleonConfig

VQ_PREFIX = "model.vqmodel."
_UNUSED_ORIGINAL = ("rope.freqs",)  # chameleon/inference/loader.py expects it and leaves it out
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "self_attn.q_norm": "attention.q_normalization",
    "self_attn.k_norm": "attention.k_normalization",
}
_MODEL_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
# The dimension that ranks share; the others are the same on each.
_SHARDED_DIM = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "tok_embeddings": 1, "output": 0}


def decoder_shapes(config: ChameleonConfig) -> dict[str, Shape]:
    """Name and shape of the conversion's tensors, with a row per head in the query-key normalisation."""
    out = llama_shapes(config.to_dict())
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    for index in range(config.num_hidden_layers):
        for name, rows in (("q_norm", heads), ("k_norm", config.num_key_value_heads or heads)):
            for part in ("weight", "bias"):
                out[f"model.layers.{index}.self_attn.{name}.{part}"] = (rows, head_dim)
    return out


def with_rows_of_heads(expected: Mapping[str, Shape], name: str, shape: Shape) -> Shape:
    """The shape of a tensor once a row per rank is repeated for the rank's heads; that of others as it is."""
    full = expected.get(name)
    if full is None or not _is_head_norm(name) or len(shape) != 2 or shape[1] != full[1]:
        return shape
    return full if shape[0] and full[0] % shape[0] == 0 else shape


def decoder_problems(expected: Mapping[str, Shape], found: Mapping[str, Shape], rule: ExactRule) -> list[str]:
    """What is wrong with a conversion's tensors; those of the pixel decoder are not looked at."""
    kept = {
        name: with_rows_of_heads(expected, name, shape)
        for name, shape in found.items()
        if not name.endswith(".rotary_emb.inv_freq")  # old releases of Transformers saved them
    }
    return rule.differences(expected, kept, surplus=(VQ_PREFIX,))


def original_files(folder: Path) -> list[Path]:
    """One file, or one of each rank in the order of ranks."""
    single = folder / "consolidated.pth"
    return [single] if single.is_file() else sorted(folder.glob("consolidated.*.pth"))


def original_problems(config: ChameleonConfig, folder: Path) -> list[str]:
    """What is wrong with the files of Meta's layout, from their headers."""
    files = original_files(folder)
    ranks = config.model_parallel_size or 1
    if len(files) != ranks:
        return [f"{folder} has {len(files)} files consolidated*.pth; params.json says model_parallel_size {ranks}"]
    expected = _shard_shapes(config)
    out = []
    for file in files:
        try:
            found = differences(expected, tensor_shapes([file]), surplus=_UNUSED_ORIGINAL)
        except ValueError as error:
            found = [str(error)]
        out += [f"{file.name}: {problem}" for problem in found]
    return out


def read_original(config: ChameleonConfig, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of Meta's files under the conversion's names and in its order of numbers, one after the other.

    The files are mapped into memory, not read as a whole. Raises ValueError that names what is wrong with them.
    """
    problems = original_problems(config, folder)
    if problems:
        raise ValueError("the weights are not those of this Chameleon: " + "; ".join(problems))
    shards = [dict(read_tensors([file])) for file in original_files(folder)]
    head_dim = config.hidden_size // config.num_attention_heads
    for name, original in _original_names(config).items():
        parts = [shard[original] for shard in shards]
        if _is_head_norm(name):
            # Meta turns neighbouring numbers of a head together, the conversion those half a head apart
            yield name, torch.stack([_halves(part, head_dim)[:, 0] for part in parts])
            continue
        dim = _sharded_dim(original)
        whole = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        is_turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        yield name, _halves(whole, head_dim) if is_turned else whole


def _halves(rows: Tensor, head_dim: int) -> Tensor:
    """[heads * head_dim, ...], pairs (0, 1), (2, 3), ... of a head -> evens first, then odds; a vector -> [.., 1]."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1] if rows.dim() > 1 else 1)
    return pairs.transpose(1, 2).reshape(rows.shape[0], -1)


def _is_head_norm(name: str) -> bool:
    return ".q_norm." in name or ".k_norm." in name


def _original_names(config: ChameleonConfig) -> dict[str, str]:
    out = {f"{name}.weight": f"{original}.weight" for name, original in _MODEL_NAMES.items()}
    for index in range(config.num_hidden_layers):
        for name, original in _LAYER_NAMES.items():
            for part in ("weight", "bias") if name.endswith("_norm") else ("weight",):
                out[f"model.layers.{index}.{name}.{part}"] = f"layers.{index}.{original}.{part}"
    return out


def _sharded_dim(original: str) -> int | None:
    return _SHARDED_DIM.get(original.split(".")[-2])


def _shard_shapes(config: ChameleonConfig) -> dict[str, Shape]:
    """Name and shape of the tensors in each of Meta's files."""
    whole = decoder_shapes(config)
    ranks = config.model_parallel_size or 1
    out: dict[str, Shape] = {}
    for name, original in _original_names(config).items():
        shape = list(whole[name][1:] if _is_head_norm(name) else whole[name])
        dim = _sharded_dim(original)
        if dim is not None:
            shape[dim] //= ranks
        out[original] = tuple(shape)
    return out
