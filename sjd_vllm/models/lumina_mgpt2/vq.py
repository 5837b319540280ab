"""MoVQ, the autoencoder of Lumina-mGPT 2.0: codes to pixels and back.

A VQGAN whose decoder normalises every map with a scale and a shift that it reads from the code vectors at each place
(spatially conditional normalisation, arXiv 2209.09002). The modules have the names of the published file,
movqgan_270M.ckpt of ai-forever/MoVQGAN, so its tensors load as they are. Source: Alpha-VLLM/Lumina-mGPT-2.0,
lumina_mgpt/movqgan/models/vqgan.py (`MOVQ`), modules/vqvae/movq_modules.py and vqvae_blocks.py.

Every norm takes its statistics from the whole map, so the pixels of some first rows alone are a preview: close to those
rows of the finished picture, not equal to them. Letters: B pictures, C channels, h x w positions of a map.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd_vllm.models.lumina_mgpt2.config import MoVQShape
from sjd_vllm.models.pixel_attention import pixel_attention
from sjd_vllm.models.tensors import Shape, differences, read_tensors, tensor_shapes

# What training leaves in the file: the loss's networks and the moving averages of the weights. The authors load the
# weights themselves and leave these (`strict=False` in `get_movqgan_model`).
_UNUSED = ("loss.", "ema_encoder.", "ema_decoder.", "ema_quantize.", "ema_quant_conv.", "ema_post_quant_conv.")
_PIXELS_AT_ONCE = 1 << 19  # a map of 256 channels over as many takes 0.5 GiB in float32
_VECTORS_AT_ONCE = 2048  # distances to 16384 codes take 128 MiB


class SpatialNorm(nn.Module):
    """GroupNorm, then a scale and a shift by place, which are linear in the code vectors."""

    def __init__(self, channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm_layer = _group_norm(channels)
        self.conv_y = nn.Conv2d(code_dim, channels, 1)
        self.conv_b = nn.Conv2d(code_dim, channels, 1)

    def forward(self, maps: Tensor, vectors: Tensor) -> Tensor:
        # A convolution of 1 x 1 commutes with repeating neighbours, and is cheaper before it.
        size = maps.shape[-2:]
        scale, shift = (F.interpolate(conv(vectors), size=size) for conv in (self.conv_y, self.conv_b))
        return torch.addcmul(shift, self.norm_layer(maps), scale)


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm and a SiLU; `code_dim` is None in the encoder."""

    def __init__(self, fan_in: int, fan_out: int, code_dim: int | None) -> None:
        super().__init__()
        self.norm1 = _norm(fan_in, code_dim)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.norm2 = _norm(fan_out, code_dim)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(fan_in, fan_out, 1) if fan_in != fan_out else None

    def forward(self, maps: Tensor, *vectors: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(maps, *vectors)))
        out = self.conv2(F.silu(self.norm2(out, *vectors)))
        return out + (maps if self.nin_shortcut is None else self.nin_shortcut(maps))  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """Every position of a map looks at every other."""

    def __init__(self, channels: int, code_dim: int | None) -> None:
        super().__init__()
        self.norm = _norm(channels, code_dim)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, maps: Tensor, *vectors: Tensor) -> Tensor:
        normed = self.norm(maps, *vectors)
        query, key, value = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = pixel_attention(query, key, value).transpose(1, 2).reshape(maps.shape)
        return maps + self.proj_out(attended)  # type: ignore[no-any-return]


class Level(nn.Module):
    """The blocks of one size of map, and the way to the next."""

    def __init__(
        self, widths: list[int], has_attention: bool, code_dim: int | None, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(fan_in, fan_out, code_dim) for fan_in, fan_out in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(width, code_dim) for width in widths[1:] if has_attention)
        if resample is not None:
            self.add_module("downsample" if code_dim is None else "upsample", resample)

    def forward(self, maps: Tensor, *vectors: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            maps = block(maps, *vectors)
            if len(self.attn):
                maps = self.attn[index](maps, *vectors)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                maps = getattr(self, name)(maps)
        return maps


class Middle(nn.Module):
    """Residual, attention, residual, on the smallest map."""

    def __init__(self, channels: int, code_dim: int | None) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, code_dim)
        self.attn_1 = AttentionBlock(channels, code_dim)
        self.block_2 = ResidualBlock(channels, channels, code_dim)

    def forward(self, maps: Tensor, *vectors: Tensor) -> Tensor:
        maps = self.attn_1(self.block_1(maps, *vectors), *vectors)
        return self.block_2(maps, *vectors)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halves a map; zeros are added right and below alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv(F.pad(maps, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Doubles a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv(F.interpolate(maps, scale_factor=2.0))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Pixels [B, 3, height, width] -> latents [B, C, h, w]."""

    def __init__(self, shape: MoVQShape) -> None:
        super().__init__()
        widths = [shape.base_channels * one for one in shape.channel_multipliers]
        self.conv_in = nn.Conv2d(3, shape.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = shape.base_channels
        for index, width in enumerate(widths):
            resample = Downsample(width) if index < len(widths) - 1 else None
            blocks = [before, *[width] * shape.num_res_blocks]
            self.down.append(Level(blocks, index in shape.attention_levels, None, resample))
            before = width
        self.mid = Middle(before, None)
        self.norm_out = _group_norm(before)
        self.conv_out = nn.Conv2d(before, shape.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.conv_in(pixels)
        for level in self.down:
            maps = level(maps)
        return self.conv_out(F.silu(self.norm_out(self.mid(maps))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents [B, C, h, w] and the code vectors [B, D, h, w] that they are made of -> pixels [B, 3, height, width]."""

    def __init__(self, shape: MoVQShape) -> None:
        super().__init__()
        widths = [shape.base_channels * one for one in shape.channel_multipliers]
        self.conv_in = nn.Conv2d(shape.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], shape.code_dim)
        levels = []
        before = widths[-1]
        for index, width in reversed(list(enumerate(widths))):
            resample = Upsample(width) if index else None
            blocks = [before, *[width] * (shape.num_res_blocks + 1)]
            levels.append(Level(blocks, index in shape.attention_levels, shape.code_dim, resample))
            before = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = SpatialNorm(before, shape.code_dim)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, latents: Tensor, vectors: Tensor) -> Tensor:
        maps = self.mid(self.conv_in(latents), vectors)
        for level in reversed(self.up):
            maps = level(maps, vectors)
        return self.conv_out(F.silu(self.norm_out(maps, vectors)))  # type: ignore[no-any-return]


class Codebook(nn.Module):
    """A vector for each code."""

    def __init__(self, shape: MoVQShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.num_codes, shape.code_dim)


class MoVQ(nn.Module):
    """The whole autoencoder."""

    def __init__(self, shape: MoVQShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        self.quantize = Codebook(shape)
        self.quant_conv = nn.Conv2d(shape.latent_channels, shape.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(shape.code_dim, shape.latent_channels, 1)

    @classmethod
    def from_file(cls, file: Path, shape: MoVQShape) -> MoVQ:
        """The published file, in float32. Raises ValueError that names each tensor that is missing or misshapen."""
        problems = movq_problems(file, shape)
        if problems:
            raise ValueError(f"{file} cannot be loaded: " + "; ".join(problems))
        with torch.device("meta"):
            model = cls(shape).eval()
        names = model.state_dict().keys()
        model.load_state_dict({name: one.float() for name, one in read_tensors([file]) if name in names}, assign=True)
        return model

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes long [B, h, w], any number of rows -> pixels [B, 3, height, width], about [-1, 1]."""
        pixels = codes[0].numel() * self.shape.pixels_per_code**2
        return torch.cat([self._decode(few).cpu() for few in torch.split(codes, max(1, _PIXELS_AT_ONCE // pixels))])

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, height, width] in [-1, 1] -> the nearest codes, long [B, h, w]."""
        latents = self.quant_conv(self.encoder(pixels)).movedim(1, -1)
        book = self.quantize.embedding.weight
        # |z - e|^2 without |z|^2, which is the same for all entries
        norms = book.square().sum(1)
        few = torch.split(latents.flatten(0, 2), _VECTORS_AT_ONCE)
        return torch.cat([torch.addmm(norms, z, book.T, alpha=-2).argmin(-1) for z in few]).view(latents.shape[:-1])

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = self.quantize.embedding(codes).movedim(-1, 1).contiguous()
        return self.decoder(self.post_quant_conv(vectors), vectors)  # type: ignore[no-any-return]


def movq_problems(file: Path, shape: MoVQShape) -> list[str]:
    """What is wrong with the tensors of the file, one line each. Raises ValueError for a file that is damaged."""
    with torch.device("meta"):
        expected: dict[str, Shape] = {name: tuple(one.shape) for name, one in MoVQ(shape).state_dict().items()}
    return differences(expected, tensor_shapes([file]), surplus=_UNUSED)


def _norm(channels: int, code_dim: int | None) -> nn.Module:
    return _group_norm(channels) if code_dim is None else SpatialNorm(channels, code_dim)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)
