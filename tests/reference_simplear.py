"""The Cosmos video decoder (DV8x16x16) as published: causal convolutions over time and space, any number of frames.

Written from NVIDIA's cosmos_tokenizer/modules/layers3d.py (`DecoderFactorized`), patching.py and quantizers.py, with
the published names, so that a trace of it is a decoder.jit. It shares nothing with sjd_vllm.models.simplear.vq.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv3d = nn.Conv3d(fan_in, fan_out, kernel)

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = self.kernel
        x = torch.cat([x[:, :, :1]] * (time - 1) + [x], dim=2)
        return self.conv3d(F.pad(x, (width // 2, width // 2, height // 2, height // 2)))


class FrameNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(frame) for frame in x.unbind(2)], dim=2)


def pair(fan_in: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(Conv(fan_in, fan_out, (1, 3, 3)), Conv(fan_out, fan_out, (3, 1, 1)))


class Block(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(fan_in), pair(fan_in, fan_out)
        self.norm2, self.conv2 = FrameNorm(fan_out), pair(fan_out, fan_out)
        if fan_in != fan_out:
            self.nin_shortcut = Conv(fan_in, fan_out, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(x)
        out = self.conv1(out * out.sigmoid())
        out = self.norm2(out)
        out = self.conv2(out * out.sigmoid())
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + out


class Attention(nn.Module):
    """Within each frame, or at each place over the frames up to its own."""

    def __init__(self, channels: int, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.norm = FrameNorm(channels)
        self.q, self.k, self.v, self.proj_out = (Conv(channels, channels, (1, 1, 1)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        equation = "bcihw,bcjhw->bhwij" if self.over_time else "bctn,bctm->btnm"
        q, k, v = (layer(normed) for layer in (self.q, self.k, self.v))
        if not self.over_time:
            q, k, v = q.flatten(3), k.flatten(3), v.flatten(3)
        scores = torch.einsum(equation, q, k) * x.shape[1] ** -0.5
        if self.over_time:
            scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, -torch.inf)
            out = torch.einsum("bhwij,bcjhw->bcihw", scores.softmax(-1), v)
        else:
            out = torch.einsum("btnm,bctm->bctn", scores.softmax(-1), v).reshape(x.shape)
        return x + self.proj_out(out)


class Up(nn.Module):
    def __init__(self, channels: int, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.conv1 = Conv(channels, channels, (3, 1, 1))
        self.conv2 = Conv(channels, channels, (1, 3, 3))
        self.conv3 = Conv(channels, channels, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.over_time:
            if x.shape[2] > 1:
                x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = self.conv1(x) + x
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return self.conv3(self.conv2(x) + x)


class Decoder(nn.Module):
    def __init__(self, channels: int, z_channels: int = 16) -> None:
        super().__init__()
        fine, coarse = 2 * channels, 4 * channels
        self.conv_in = pair(z_channels, coarse)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = Block(coarse, coarse), Block(coarse, coarse)
        self.mid.attn_1 = nn.Sequential(Attention(coarse, False), Attention(coarse, True))
        self.up = nn.ModuleList()
        for fan_in, fan_out, up in (
            (coarse, fine, None),
            (coarse, coarse, Up(coarse, True)),
            (coarse, coarse, Up(coarse, False)),
        ):
            level = nn.Module()
            level.block = nn.ModuleList([Block(fan_in, fan_out), Block(fan_out, fan_out), Block(fan_out, fan_out)])
            if up is not None:
                level.upsample = up
            self.up.append(level)
        self.norm_out = FrameNorm(fine)
        self.conv_out = pair(fine, 3 * 64)
        self.unpatcher3d = Unpatch()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        x = self.norm_out(x)
        return self.unpatcher3d(self.conv_out(x * x.sigmoid()))


class Unpatch(nn.Module):
    """Twice the inverse Haar transform over time, height and width; the frames before the first are cut off."""

    def __init__(self) -> None:
        super().__init__()
        root = 0.5**0.5
        self.register_buffer("wavelets", torch.tensor([[root, root], [root, -root]]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            batch, channels, frames, height, width = x.shape
            parts = x.reshape(batch, 2, 2, 2, channels // 8, frames, height, width)
            w = self.wavelets
            x = torch.einsum("bijkcthw,ip,jq,kr->bctphqwr", parts, w, w, w) * 8**0.5
            x = x.reshape(batch, channels // 8, 2 * frames, 2 * height, 2 * width)
        return x[:, :, 3:]


class InverseQuantizer(nn.Module):
    """Indices [B, T, H, W] to vectors [B, levels, T, H, W]."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.quantizer = nn.Module()
        self.quantizer.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.basis = [math.prod(levels[:index]) for index in range(len(levels))]
        self.quantizer.register_buffer("_basis", torch.tensor(self.basis), persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        digits = torch.stack([indices // base for base in self.basis], dim=1)
        levels = self.quantizer._levels.view(1, -1, 1, 1, 1)
        return (digits % levels - levels // 2) / (levels // 2)


class ReferenceDecoder(nn.Module):
    """decoder.jit before it is traced."""

    def __init__(self, levels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.inv_quant = InverseQuantizer(levels)
        self.post_quant_conv = Conv(len(levels), 16, (1, 1, 1))
        self.decoder = Decoder(channels)

    def forward(self, indices: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.inv_quant(indices)))
