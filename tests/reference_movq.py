"""A plain rendering of the published MoVQ autoencoders, in their authors' names, for comparison.

It shares no code with the package. Sources: ai-forever/MoVQGAN as Lumina-mGPT 2.0 uses it (Alpha-VLLM/Lumina-mGPT-2.0,
lumina_mgpt/movqgan: models/vqgan.py, modules/vqvae/movq_modules.py, vqvae_blocks.py), and the vision tokenizer of Emu3
(baaivision/Emu3, emu3/tokenizer/modeling_emu3visionvq.py), which adds layers over time. Letters: B pictures, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are read from a map of code vectors."""

    def __init__(self, channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(code_dim, channels, 1)
        self.conv_b = nn.Conv2d(code_dim, channels, 1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        code = F.interpolate(code, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(code) + self.conv_b(code)


class PlainNorm(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        return super().forward(x)


def norm(channels: int, code_dim: int | None) -> nn.Module:
    return PlainNorm(channels) if code_dim is None else SpatialNorm(channels, code_dim)


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, code_dim: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs, code_dim), norm(outputs, code_dim)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        h = self.conv1(swish(self.norm1(x, code)))
        h = self.conv2(swish(self.norm2(h, code)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, channels: int, code_dim: int | None) -> None:
        super().__init__()
        self.norm = norm(channels, code_dim)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        h = self.norm(x, code)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, positions]
        weights = (torch.einsum("bcq,bck->bqk", q, k) / q.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bqk,bck->bcq", weights, v).view(x.shape))


class Mid(nn.Module):
    def __init__(self, channels: int, code_dim: int | None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, code_dim)
        self.attn_1 = AttnBlock(channels, code_dim)
        self.block_2 = ResnetBlock(channels, channels, code_dim)

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, code), code), code)


class Resample(nn.Module):
    def __init__(self, channels: int, is_up: bool) -> None:
        super().__init__()
        self.is_up = is_up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if is_up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def level(inputs: int, outputs: int, num_blocks: int, has_attention: bool, code_dim: int | None) -> nn.Module:
    out = nn.Module()
    out.block = nn.ModuleList(ResnetBlock(inputs if i == 0 else outputs, outputs, code_dim) for i in range(num_blocks))
    out.attn = nn.ModuleList(AttnBlock(outputs, code_dim) for _ in range(num_blocks if has_attention else 0))
    return out


def run_level(one: nn.Module, x: Tensor, code: Tensor | None = None) -> Tensor:
    for index, block in enumerate(one.block):
        x = block(x, code)
        if len(one.attn):
            x = one.attn[index](x, code)
    return x


class CausalConv3d(nn.Module):
    """Pads with zeros: two frames before, none after, and the neighbours over space."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], time_stride: int = 1) -> None:
        super().__init__()
        side = kernel[1] // 2
        self.padding = (side, side, side, side, 2, 0)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=(time_stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class TimeConv(nn.Module):
    """Halves or doubles the frames."""

    def __init__(self, channels: int, is_up: bool) -> None:
        super().__init__()
        self.is_up = is_up
        self.conv = CausalConv3d(channels, channels, (3 if is_up else 4, 3, 3), 1 if is_up else 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=2) if self.is_up else x)


class TimeResnetBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm3d(channels), nn.BatchNorm3d(channels)
        self.conv1, self.conv2 = (CausalConv3d(channels, channels, (3, 3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))


class Encoder(nn.Module):
    def __init__(self, ch: int, ch_mult: list[int], num_res_blocks: int, attn: list[int], z: int, time: int) -> None:
        super().__init__()
        widths = [ch, *(ch * m for m in ch_mult)]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            one = level(widths[i], widths[i + 1], num_res_blocks, i in attn, None)
            if i < len(ch_mult) - 1:
                one.downsample = Resample(widths[i + 1], is_up=False)
            self.down.append(one)
        self.mid = Mid(widths[-1], None)
        self.norm_out = PlainNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z, 3, padding=1)
        if time:
            self.time_conv = nn.ModuleList(TimeConv(z, is_up=False) for _ in range(time))
            self.time_res_stack = nn.Sequential(*(TimeResnetBlock(z) for _ in range(num_res_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, z, rows, columns]; every frame of a picture is that picture."""
        h = self.conv_in(x)
        for one in self.down:
            h = run_level(one, h)
            h = one.downsample(h) if hasattr(one, "downsample") else h
        h = self.conv_out(swish(self.norm_out(self.mid(h))))
        if not hasattr(self, "time_conv"):
            return h
        video = torch.stack([h] * 2 ** len(self.time_conv), dim=2)
        for conv in self.time_conv:
            video = swish(conv(video))
        return self.time_res_stack(video)


class Decoder(nn.Module):
    def __init__(
        self, ch: int, ch_mult: list[int], num_res_blocks: int, attn: list[int], z: int, code_dim: int, time: int
    ) -> None:
        super().__init__()
        widths = [*(ch * m for m in ch_mult), ch * ch_mult[-1]]
        if time:
            self.time_res_stack = nn.Sequential(*(TimeResnetBlock(z) for _ in range(num_res_blocks)))
            self.time_conv = nn.ModuleList(TimeConv(z, is_up=True) for _ in range(time))
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], code_dim)
        self.up = nn.ModuleList()
        for i in range(len(ch_mult)):
            one = level(widths[i + 1], widths[i], num_res_blocks + 1, i in attn, code_dim)
            if i:
                one.upsample = Resample(widths[i], is_up=True)
            self.up.append(one)
        self.norm_out = SpatialNorm(widths[0], code_dim)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor, code: Tensor) -> Tensor:
        """Latents and vectors [B, C, T, rows, columns] -> [B, frames, 3, height, width]."""
        both = torch.cat([z, code])
        if hasattr(self, "time_conv"):
            both = self.time_res_stack(both)
            for conv in self.time_conv:
                both = swish(conv(both))
        batch, frames = len(z), both.shape[2]
        h, code = both.transpose(1, 2).flatten(0, 1).chunk(2)
        h = self.mid(self.conv_in(h), code)
        for one in reversed(self.up):
            h = run_level(one, h, code)
            h = one.upsample(h) if hasattr(one, "upsample") else h
        return self.conv_out(swish(self.norm_out(h, code))).unflatten(0, (batch, frames))


class ReferenceMoVQ(nn.Module):
    """`time`: how often time is halved; 0 is MoVQGAN, 2 the published Emu3."""

    def __init__(
        self,
        *,
        num_codes: int,
        code_dim: int,
        z: int,
        ch: int,
        ch_mult: list[int],
        num_res_blocks: int,
        attn: list[int],
        time: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, attn, z, time)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, attn, z, code_dim, time)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(num_codes, code_dim)
        self.has_time = bool(time)
        if time:
            self.quant_conv = CausalConv3d(z, code_dim, (3, 1, 1))
            self.post_quant_conv = CausalConv3d(code_dim, z, (3, 1, 1))
        else:
            self.quant_conv, self.post_quant_conv = nn.Conv2d(z, code_dim, 1), nn.Conv2d(code_dim, z, 1)

    def randomise(self, seed: int) -> ReferenceMoVQ:
        """Weights that let every layer matter, running statistics included."""
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 10
                tensor.normal_(0, fan_in**-0.5, generator=generator)
                if tensor.ndim == 1 and "norm" in name and name.endswith("weight"):
                    tensor.add_(1)
        return self.eval()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> codes [B, rows, columns]."""
        latents = self.quant_conv(self.encoder(pixels))
        latents = latents[:, :, 0] if self.has_time else latents
        flat = latents.movedim(1, -1)
        distances = (flat[..., None, :] - self.quantize.embedding.weight).square().sum(-1)
        return distances.argmin(-1)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """[B, rows, columns] -> pixels [B, 3, height, width]; the first of the frames."""
        code = self.quantize.embedding(codes).movedim(-1, 1)
        if self.has_time:
            code = code[:, :, None]
            return self.decoder(self.post_quant_conv(code), code)[:, 0]
        return self.decoder(self.post_quant_conv(code)[:, :, None], code[:, :, None])[:, 0]
