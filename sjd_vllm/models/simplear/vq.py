"""The decoder of NVIDIA's Cosmos-Tokenizer-DV8x16x16, for one frame: codes to pixels, 16 x 16 of them each.

It is a decoder of videos (cosmos_tokenizer/modules/layers3d.py, `DecoderFactorized`), and SimpleAR's pictures are
videos of one frame. Convolutions over time look back, and before the first frame they see that frame again; with one
frame that is the sum of their kernel over time, so each is a convolution over space here, and its weights are summed
when they are loaded. Nothing is upsampled in time, attention over time has one position to look at, and of the frames
that the inverse wavelet transform unfolds the last is kept.

Parameters have the published names. Shapes: B pictures, C channels, H x W positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd_vllm.models.pixel_attention import pixel_attention
from sjd_vllm.models.tensors import Shape, differences, read_tensors, tensor_shapes

PIXELS_PER_CODE = 16
_PATCH = 4  # pixels of a side that the wavelets make one position of
# Constants that tracing the modules left among the tensors: levels of the quantiser, wavelets.
_UNUSED = ("inv_quant.", "decoder.unpatcher3d.")


@dataclass(frozen=True)
class CosmosShape:
    """Sizes of the decoder; the defaults are published (cosmos_tokenizer/networks/configs.py, `discrete_video`).

    Attributes:
        levels: of each number of a code's vector; their product is the size of the codebook.
        channels: base width.
        multipliers: of the width, from the finest maps to the coarsest.
        num_res_blocks: of the encoder's levels; the decoder's have one more.
        z_channels: width of the maps that enter.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    channels: int = 128
    multipliers: tuple[int, ...] = (2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)


class FlatConv(nn.Module):
    """A causal convolution over time, height and width, on a single frame.

    Args:
        over_time: length of the published kernel in time.
    """

    def __init__(self, fan_in: int, fan_out: int, kernel: int, over_time: int = 1) -> None:
        super().__init__()
        self.over_time = over_time
        self.conv3d = nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3d(x)
        return out

    def published_shape(self) -> Shape:
        """Of the kernel in the checkpoint."""
        fan_out, fan_in, height, width = self.conv3d.weight.shape
        return (fan_out, fan_in, self.over_time, height, width)


class Norm(nn.Module):
    """Over all channels and positions of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


def _factorized(fan_in: int, fan_out: int) -> nn.Sequential:
    """Over space, then over time."""
    return nn.Sequential(FlatConv(fan_in, fan_out, 3), FlatConv(fan_out, fan_out, 1, over_time=3))


class ResidualBlock(nn.Module):
    """Two factorized convolutions beside the identity, or beside a 1 x 1 convolution where the width changes."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.norm1 = Norm(fan_in)
        self.conv1 = _factorized(fan_in, fan_out)
        self.norm2 = Norm(fan_out)
        self.conv2 = _factorized(fan_out, fan_out)
        self.nin_shortcut = FlatConv(fan_in, fan_out, 1) if fan_in != fan_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        out = self.conv2(F.silu(self.norm2(out)))
        merged: Tensor = self.nin_shortcut(x) + out
        return merged


class SpatialAttention(nn.Module):
    """Attention over the positions of the frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q, self.k, self.v, self.proj_out = (FlatConv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out: Tensor = self.proj_out(pixel_attention(query, key, value).transpose(1, 2).reshape(x.shape))
        return x + out


class TemporalAttention(SpatialAttention):
    """Attention over one frame, which is that frame's value whatever query and key say."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj_out(self.v(self.norm(x)))
        return x + out


class Upsample(nn.Module):
    """Doubles height and width (`CausalHybridUpsample3d`, in space; `over_time` says whether the time branch is on)."""

    def __init__(self, channels: int, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.conv1 = FlatConv(channels, channels, 1, over_time=3)
        self.conv2 = FlatConv(channels, channels, 3)
        self.conv3 = FlatConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.over_time:
            x = self.conv1(x) + x
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv3(self.conv2(x) + x)
        return out


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = nn.Sequential(SpatialAttention(channels), TemporalAttention(channels))
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """Residual blocks on maps of one size, and the way to the next size."""

    def __init__(self, fan_in: int, fan_out: int, num_blocks: int, upsample: Upsample | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(fan_in if i == 0 else fan_out, fan_out) for i in range(num_blocks))
        self.upsample = upsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        out: Tensor = self.upsample(x)
        return out


class FrameDecoder(nn.Module):
    """Maps [B, z, H, W] to pixels [B, 3, 16 H, 16 W]."""

    def __init__(self, shape: CosmosShape) -> None:
        super().__init__()
        widths = [shape.channels * multiplier for multiplier in shape.multipliers]
        self.conv_in = _factorized(shape.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        coarsest = len(widths) - 1
        levels: list[Level] = []
        for index in reversed(range(len(widths))):
            fan_in = widths[min(index + 1, coarsest)]
            # 16 pixels a code are 4 of the wavelets' and two doublings; the second of them has the branch over time
            upsample = Upsample(widths[index], over_time=index != coarsest) if index > 0 else None
            levels.insert(0, Level(fan_in, widths[index], shape.num_res_blocks + 1, upsample))
        self.up = nn.ModuleList(levels)
        self.norm_out = Norm(widths[0])
        self.conv_out = _factorized(widths[0], 3 * _PATCH**3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        for _ in range(int(math.log2(_PATCH))):
            x = inverse_haar(x)
        return x


def inverse_haar(x: Tensor) -> Tensor:
    """The last frame of the inverse Haar transform over time, height and width: [B, 8 C, H, W] -> [B, C, 2 H, 2 W].

    The eight parts are low and high in time, then height, then width; each step back is a sum and a difference over
    sqrt(2), and the published transform (patching.py, `UnPatcher3D`) scales the three of them by 2 sqrt(2).
    """
    low, high = x.chunk(2, dim=1)
    last = low - high
    low, high = last.chunk(2, dim=1)
    tall = torch.stack([low + high, low - high], dim=-2).flatten(-3, -2)
    low, high = tall.chunk(2, dim=1)
    return torch.stack([low + high, low - high], dim=-1).flatten(-2)


class CosmosDecoder(nn.Module):
    """Codes to pixels.

    Args:
        shape: sizes.
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(self, shape: CosmosShape) -> None:
        super().__init__()
        self.post_quant_conv = FlatConv(len(shape.levels), shape.z_channels, 1)
        self.decoder = FrameDecoder(shape)
        basis = [math.prod(shape.levels[:index]) for index in range(len(shape.levels))]
        self.register_buffer("_levels", torch.tensor(shape.levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)

    @classmethod
    def load(cls, shape: CosmosShape, file: Path) -> CosmosDecoder:
        """From the published decoder.jit; float32. Raises ValueError that names what is wrong with it."""
        with torch.device("meta"):
            expected = cls(shape)
        problems = expected.problems(tensor_shapes([file]))
        if problems:
            raise ValueError(f"{file}: " + "; ".join(problems))
        model = cls(shape)
        published = model.published_shapes()
        weights = {
            name: tensor.float().sum(dim=2) if tensor.ndim == 5 else tensor.float()
            for name, tensor in read_tensors([file], published)
        }
        model.load_state_dict(weights)
        return model.eval()

    def published_shapes(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the checkpoint that is read."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        for name, module in self.named_modules():
            if isinstance(module, FlatConv):
                shapes[f"{name}.conv3d.weight"] = module.published_shape()
        return shapes

    def problems(self, found: dict[str, Shape]) -> list[str]:
        """What is wrong with the tensors found in a file, one line each."""
        return differences(self.published_shapes(), found, surplus=_UNUSED)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes long [B, rows, columns], any number of rows -> pixels [B, 3, 16 rows, 16 columns], about [-1, 1].

        One picture after the other: at 1024 x 1024 the maps of one take a gigabyte.
        """
        return torch.cat([self._decode(one).cpu() for one in torch.split(codes, 1)])

    def vectors(self, codes: Tensor) -> Tensor:
        """The numbers that a code's index stands for, each between -1 and 1: [..., levels] (quantizers.py, FSQ)."""
        halves = self._levels // 2
        return ((codes[..., None] // self._basis) % self._levels - halves) / halves

    def _decode(self, codes: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(self.vectors(codes).movedim(-1, 1)))
        return out
