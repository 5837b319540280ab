"""Plain PyTorch renderings of Meta's release, read from its files: the decoder, and the pixel decoder.

They follow chameleon/inference/transformer.py and vqgan.py of facebookresearch/chameleon and share no code with the
package: numbers of a head are turned in neighbouring pairs, each rank of the files computes its own heads and columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class MetaReference:
    """Logits [L, V] after each token, from models/7b of Meta's layout."""

    def __init__(self, folder: Path) -> None:
        params = json.loads((folder / "params.json").read_text())
        self.params: dict[str, Any] = params["model"]
        single = folder / "consolidated.pth"
        files = [single] if single.is_file() else sorted(folder.glob("consolidated.*.pth"))
        self.shards = [torch.load(file, weights_only=True) for file in files]

    @torch.inference_mode()
    def __call__(self, token_ids: list[int]) -> Tensor:
        h = torch.cat([shard["tok_embeddings.weight"][token_ids] for shard in self.shards], dim=-1)
        for layer in range(self.params["n_layers"]):
            norms = [self.shards[0][f"layers.{layer}.{name}_norm.weight"] for name in ("attention", "ffn")]
            if self.params["swin_norm"]:
                h = h + self._rms(self._attention(h, layer), norms[0])
                h = h + self._rms(self._mlp(h, layer), norms[1])
            else:
                h = h + self._attention(self._rms(h, norms[0]), layer)
                h = h + self._mlp(self._rms(h, norms[1]), layer)
        h = self._rms(h, self.shards[0]["norm.weight"])
        return torch.cat([h @ shard["output.weight"].T for shard in self.shards], dim=-1)

    def _attention(self, h: Tensor, layer: int) -> Tensor:
        head_dim = self.params["dim"] // self.params["n_heads"]
        out = torch.zeros_like(h)
        for shard in self.shards:
            part = {name: shard[f"layers.{layer}.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo")}
            query, key, value = ((h @ part[name].T).unflatten(-1, (-1, head_dim)) for name in ("wq", "wk", "wv"))
            prefix = f"layers.{layer}.attention."
            query, key = (
                F.layer_norm(x, (head_dim,), shard[f"{prefix}{n}.weight"], shard[f"{prefix}{n}.bias"])
                for x, n in ((query, "q_normalization"), (key, "k_normalization"))
            )
            query, key = self._turn(query), self._turn(key)
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            scores = torch.einsum("qhd,khd->hqk", query, key) / head_dim**0.5
            scores = scores + torch.full_like(scores[0], -torch.inf).triu(1)
            out = out + torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1) @ part["wo"].T
        return out

    def _turn(self, x: Tensor) -> Tensor:
        """Pairs (0, 1), (2, 3), ... as complex numbers, turned by position and frequency."""
        half = x.shape[-1] // 2
        angles = torch.arange(len(x))[:, None] * self.params["rope_theta"] ** (-torch.arange(half) / half)
        turned = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * torch.exp(1j * angles)[:, None]
        return torch.view_as_real(turned).flatten(-2).float()

    def _mlp(self, h: Tensor, layer: int) -> Tensor:
        out = torch.zeros_like(h)
        for shard in self.shards:
            w1, w2, w3 = (shard[f"layers.{layer}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
            out = out + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
        return out

    def _rms(self, h: Tensor, weight: Tensor) -> Tensor:
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.params["norm_eps"]) * weight


@torch.inference_mode()
def decode_pixels(weights: Mapping[str, Tensor], codes: Tensor, config: Mapping[str, Any]) -> Tensor:
    """[B, rows, columns] -> [B, 3, H, W] by VQModel.decode, from the tensors of vqgan.ckpt and vqgan.yaml's params."""
    dd = config["ddconfig"]

    def conv(name: str, x: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        return (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in weights else x) + h

    def attention(name: str, x: Tensor) -> Tensor:
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(2), v)
        return x + conv(f"{name}.proj_out", mixed.view(x.shape))

    h = weights["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
    h = conv("decoder.conv_in", conv("post_quant_conv", h))
    h = block("decoder.mid.block_1", h)
    h = block("decoder.mid.block_2", attention("decoder.mid.attn_1", h))
    side = dd["resolution"] // 2 ** (len(dd["ch_mult"]) - 1)
    for level in reversed(range(len(dd["ch_mult"]))):
        for index in range(dd["num_res_blocks"] + 1):
            h = block(f"decoder.up.{level}.block.{index}", h)
            if side in dd["attn_resolutions"]:
                h = attention(f"decoder.up.{level}.attn.{index}", h)
        if level:
            h = conv(f"decoder.up.{level}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            side *= 2
    return conv("decoder.conv_out", swish(norm("decoder.norm_out", h)))
