"""The VQ autoencoder of LlamaGen, with the published names (tokenizer/tokenizer_image/vq_model.py, `VQModel`).

Shapes: B pictures, G x G grid of codes, P pixels a code and side (16 or 8), C numbers of a code's vector, K codes.
Codes' vectors, and what the encoder compares with them, have the length 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd_vllm.models.pixel_attention import pixel_attention
from sjd_vllm.models.tensors import Shape, differences, read_tensors

_GROUPS = 32
_MAX_PIXELS = 1 << 19  # decoded at once: the widest maps take 128 numbers a pixel
UNUSED = ("quantize.codebook_used",)  # which codes training met


@dataclass(frozen=True)
class VQShape:
    """Figures of an autoencoder.

    Attributes:
        num_codes, code_dim: K and C.
        base_channels: of the maps at full resolution.
        levels: channels of each resolution, the finest first.
        num_blocks: residual blocks of a resolution in the encoder; the decoder has one more.
        latent_channels: between the encoder and the codes.
    """

    num_codes: int
    code_dim: int
    base_channels: int
    levels: tuple[int, ...]
    num_blocks: int
    latent_channels: int

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> VQShape:
        """From the shapes of the encoder's tensors. Raises KeyError for one that is missing."""
        blocks = [
            (int(match[1]), int(match[2]))
            for name in shapes
            if (match := re.fullmatch(r"encoder\.conv_blocks\.(\d+)\.res\.(\d+)\.conv2\.weight", name))
        ]
        num_levels = max((level for level, _ in blocks), default=-1) + 1
        num_codes, code_dim = shapes["quantize.embedding.weight"]
        return cls(
            num_codes=num_codes,
            code_dim=code_dim,
            base_channels=shapes["encoder.conv_in.weight"][0],
            levels=tuple(shapes[f"encoder.conv_blocks.{i}.res.0.conv2.weight"][0] for i in range(num_levels)),
            num_blocks=max((block for _, block in blocks), default=-1) + 1,
            latent_channels=shapes["encoder.conv_out.weight"][0],
        )


class LlamaGenVQ(nn.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(shape.num_codes, shape.code_dim)})
        self.quant_conv = nn.Conv2d(shape.latent_channels, shape.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(shape.code_dim, shape.latent_channels, 1)

    @classmethod
    def from_file(cls, file: Path) -> LlamaGenVQ:
        """Load a published file; float32, in evaluation mode. Raises ValueError that names a wrong tensor."""
        tensors = dict(read_tensors([file]))
        problems = vq_problems({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if problems:
            raise ValueError(f"{file.name}: " + "; ".join(problems))
        with torch.device("meta"):
            model = cls(VQShape.of({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        weights = {name: tensor.float() for name, tensor in tensors.items() if name not in UNUSED}
        model.load_state_dict(weights, assign=True)
        return model.eval()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, rows, columns] -> pixels float [B, 3, P rows, P columns], about -1 to 1; any number of rows."""
        scale = 2 ** (len(self.shape.levels) - 1)
        num_pixels = codes.shape[1] * codes.shape[2] * scale**2
        parts = [self._decode(part).cpu() for part in torch.split(codes, max(1, _MAX_PIXELS // max(num_pixels, 1)))]
        return torch.cat(parts)

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = F.embedding(codes, self._codebook()).movedim(-1, 1)
        return self.decoder(self.post_quant_conv(vectors))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels float [B, 3, H, W] in [-1, 1] -> codes int64 [B, H / P, W / P]."""
        latents = self.quant_conv(self.encoder(pixels)).movedim(1, -1)
        # of vectors of length 1 the nearest is the one in the same direction
        return (F.normalize(latents, dim=-1) @ self._codebook().T).argmax(-1)

    def _codebook(self) -> Tensor:
        weight: Tensor = self.quantize["embedding"].weight  # type: ignore[assignment]
        return F.normalize(weight, dim=-1)


def vq_problems(shapes: Mapping[str, Shape]) -> list[str]:
    """What is wrong with the tensors of a pixel decoder's file, one line each."""
    try:
        shape = VQShape.of(shapes)
    except KeyError as error:
        return [f"the tensor {error.args[0]} is missing"]
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in LlamaGenVQ(shape).state_dict().items()}
    return differences(expected, shapes, surplus=UNUSED)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x by a 1 x 1 convolution where the channels change."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if channels_in != channels:
            self.nin_shortcut = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        out: Tensor = x + inside
        return out


class AttentionBlock(nn.Module):
    """x + attention over all positions of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        out: Tensor = x + self.proj_out(pixel_attention(query, key, value).transpose(1, 2).reshape(x.shape))
        return out


class Resample(nn.Module):
    """Twice, or half, as many pixels a side."""

    def __init__(self, channels: int, *, is_up: bool) -> None:
        super().__init__()
        self.is_up = is_up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if is_up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.is_up else F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """The blocks of one resolution, with attention at the coarsest, and the step to the next."""

    def __init__(
        self, channels_in: int, channels: int, num_blocks: int, *, is_coarsest: bool, step: str | None
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(channels if i else channels_in, channels) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttentionBlock(channels) for _ in range(num_blocks if is_coarsest else 0))
        self._step = step
        if step is not None:
            self.add_module(step, Resample(channels, is_up=step == "upsample"))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x if self._step is None else self.get_submodule(self._step)(x)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] -> latents [B, latent channels, H / P, W / P]."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        last = len(shape.levels) - 1
        self.conv_in = nn.Conv2d(3, shape.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                shape.levels[i - 1] if i else shape.base_channels,
                shape.levels[i],
                shape.num_blocks,
                is_coarsest=i == last,
                step=None if i == last else "downsample",
            )
            for i in range(len(shape.levels))
        )
        self.mid = _middle(shape.levels[-1])
        self.norm_out = _norm(shape.levels[-1])
        self.conv_out = nn.Conv2d(shape.levels[-1], shape.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.conv_blocks, *self.mid):
            x = part(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Decoder(nn.Module):
    """Latents [B, latent channels, h, w] -> pixels [B, 3, P h, P w]."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        levels = shape.levels[::-1]
        self.conv_in = nn.Conv2d(shape.latent_channels, levels[0], 3, padding=1)
        self.mid = _middle(levels[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                levels[max(i - 1, 0)],
                levels[i],
                shape.num_blocks + 1,
                is_coarsest=i == 0,
                step=None if i == len(levels) - 1 else "upsample",
            )
            for i in range(len(levels))
        )
        self.norm_out = _norm(levels[-1])
        self.conv_out = nn.Conv2d(levels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.mid, *self.conv_blocks):
            x = part(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out
