"""LlamaGen in plain PyTorch, after FoundationVision/LlamaGen (autoregressive/models/gpt.py and generate.py).

It shares no code with the model under test: all 120 rows of a caption stand in the sequence, padded in front and
masked, rotations are complex numbers, and everything is computed anew from the whole sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]


class ReferenceLlamaGen:
    """Args: tensors under the published names; heads; rows of the grid; rows of a prompt, 1 or 120."""

    def __init__(self, tensors: Tensors, *, num_heads: int, grid: int, num_prompt_rows: int) -> None:
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.num_heads = num_heads
        self.num_prompt_rows = num_prompt_rows
        self.num_layers = sum(name.endswith("attention.wo.weight") for name in tensors)
        self.dim = tensors["norm.weight"].shape[0]
        head_dim = self.dim // num_heads
        quarter = head_dim // 4
        rates = torch.tensor([10000.0 ** (-2 * j / (head_dim // 2)) for j in range(quarter)])
        turns = torch.zeros(num_prompt_rows + grid * grid, head_dim // 2, dtype=torch.complex64)  # of the prompt: zero
        for row in range(grid):
            for column in range(grid):
                angles = torch.cat([row * rates, column * rates])
                turns[num_prompt_rows + row * grid + column] = torch.polar(torch.ones_like(angles), angles)
        self.turns = turns

    def captions(self, features: Tensor) -> Tensor:
        """`cap_proj`: [L, caption width] -> [L, dim]."""
        first = self.tensors["cls_embedding.cap_proj.fc1.weight"]
        second = self.tensors["cls_embedding.cap_proj.fc2.weight"]
        x = features @ first.T
        gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return gelu @ second.T

    @torch.inference_mode()
    def logits(self, prompt: Tensor, is_padding: Tensor, codes: list[int]) -> Tensor:
        """[1 + codes, K] after the prompt and each code. prompt [rows, dim]; is_padding bool [rows]."""
        x = torch.cat([prompt, self.tensors["tok_embeddings.weight"][codes]])
        length = len(x)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[:, : self.num_prompt_rows] &= ~is_padding
        mask |= torch.eye(length, dtype=torch.bool)
        for index in range(self.num_layers):
            layer = f"layers.{index}."
            x = x + self._attention(layer, self._norm(x, layer + "attention_norm.weight"), mask)
            y = self._norm(x, layer + "ffn_norm.weight")
            gate = y @ self.tensors[layer + "feed_forward.w1.weight"].T
            up = y @ self.tensors[layer + "feed_forward.w3.weight"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ self.tensors[layer + "feed_forward.w2.weight"].T
        out = self._norm(x, "norm.weight") @ self.tensors["output.weight"].T
        return out[self.num_prompt_rows - 1 :]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.tensors[name]

    def _attention(self, layer: str, x: Tensor, mask: Tensor) -> Tensor:
        head_dim = self.dim // self.num_heads
        query, key, value = (x @ self.tensors[layer + "attention.wqkv.weight"].T).chunk(3, dim=-1)
        query, key = self._turn(query), self._turn(key)
        heads = []
        for head in range(self.num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            scores = query[:, part] @ key[:, part].T / math.sqrt(head_dim)
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ value[:, part])
        return torch.cat(heads, dim=-1) @ self.tensors[layer + "attention.wo.weight"].T

    def _turn(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.view(len(x), self.num_heads, -1, 2).contiguous())
        return torch.view_as_real(pairs * self.turns[: len(x), None]).reshape(len(x), -1)


def reference_pixels(tensors: Tensors, codes: Tensor) -> Tensor:
    """`VQModel.decode_code` step by step from the published names: codes [B, h, w] -> pixels [B, 3, P h, P w]."""
    table = tensors["quantize.embedding.weight"]
    table = table / table.norm(dim=-1, keepdim=True)
    x = _conv(tensors, "post_quant_conv", table[codes].permute(0, 3, 1, 2), padding=0)
    x = _conv(tensors, "decoder.conv_in", x)
    x = _middle(tensors, "decoder", x)
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.conv_blocks."))
    for level in range(levels):
        x = _blocks(tensors, f"decoder.conv_blocks.{level}", x)
        if level < levels - 1:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _conv(tensors, f"decoder.conv_blocks.{level}.upsample.conv", x)
    return _conv(tensors, "decoder.conv_out", _swish(_group_norm(tensors, "decoder.norm_out", x)))


def reference_codes(tensors: Tensors, pixels: Tensor) -> Tensor:
    """`VQModel.encode`'s indices: pixels [B, 3, H, W] in [-1, 1] -> codes [B, H / P, W / P]."""
    x = _conv(tensors, "encoder.conv_in", pixels)
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.conv_blocks."))
    for level in range(levels):
        x = _blocks(tensors, f"encoder.conv_blocks.{level}", x)
        if level < levels - 1:
            padded = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1)
            padded[:, :, :-1, :-1] = x
            x = _conv(tensors, f"encoder.conv_blocks.{level}.downsample.conv", padded, padding=0, stride=2)
    x = _middle(tensors, "encoder", x)
    x = _conv(tensors, "encoder.conv_out", _swish(_group_norm(tensors, "encoder.norm_out", x)))
    z = _conv(tensors, "quant_conv", x, padding=0).permute(0, 2, 3, 1)
    z = z / z.norm(dim=-1, keepdim=True)
    table = tensors["quantize.embedding.weight"]
    table = table / table.norm(dim=-1, keepdim=True)
    return (z[..., None, :] - table).square().sum(-1).argmin(-1)


def _conv(tensors: Tensors, name: str, x: Tensor, *, padding: int = 1, stride: int = 1) -> Tensor:
    return F.conv2d(x, tensors[name + ".weight"], tensors[name + ".bias"], padding=padding, stride=stride)


def _group_norm(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, tensors[name + ".weight"], tensors[name + ".bias"], eps=1e-6)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _residual(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    h = _conv(tensors, name + ".conv1", _swish(_group_norm(tensors, name + ".norm1", x)))
    h = _conv(tensors, name + ".conv2", _swish(_group_norm(tensors, name + ".norm2", h)))
    if name + ".nin_shortcut.weight" in tensors:
        x = _conv(tensors, name + ".nin_shortcut", x, padding=0)
    return x + h


def _attend(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    h = _group_norm(tensors, name + ".norm", x)
    q, k, v = (_conv(tensors, f"{name}.{part}", h, padding=0).flatten(2) for part in "qkv")
    weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
    return x + _conv(tensors, name + ".proj_out", (v @ weights.transpose(1, 2)).view_as(x), padding=0)


def _middle(tensors: Tensors, part: str, x: Tensor) -> Tensor:
    x = _residual(tensors, part + ".mid.0", x)
    return _residual(tensors, part + ".mid.2", _attend(tensors, part + ".mid.1", x))


def _blocks(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    index = 0
    while f"{name}.res.{index}.conv1.weight" in tensors:
        x = _residual(tensors, f"{name}.res.{index}", x)
        if f"{name}.attn.{index}.q.weight" in tensors:
            x = _attend(tensors, f"{name}.attn.{index}", x)
        index += 1
    return x
