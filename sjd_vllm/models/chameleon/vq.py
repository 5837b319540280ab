"""The VQ autoencoder of Chameleon (vqgan.ckpt): 16 x 16 pixels per code in the published one; Lumina-mGPT uses it too.

The architecture is that of taming-transformers, as Meta's chameleon/inference/vqgan.py has it, and the modules have its
names. Shapes: B pictures, h x w codes, C channels.

Where the weights are looked for, in this order: `vqgan.ckpt` with `vqgan.yaml` in the checkpoint's subfolder
``tokenizer`` (Meta's layout), in ``original_tokenizers`` or in the folder itself; then the checkpoint's own tensors
``model.vqmodel.*``. facebook/chameleon-7b has the encoder alone there, and Lumina-mGPT neither.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from sjd_vllm.models.chameleon.config import vqgan_file
from sjd_vllm.models.chameleon.weights import VQ_PREFIX
from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.pixel_attention import pixel_attention
from sjd_vllm.models.tensors import Shape, differences, read_tensors, tensor_shapes

if TYPE_CHECKING:
    from transformers import ChameleonConfig

WHERE = (
    "put vqgan.ckpt and vqgan.yaml into its subfolder tokenizer (Meta's Chameleon download has them; so has the folder "
    "original_tokenizers of Alpha-VLLM/Chameleon_7B_mGPT)"
)
_UNUSED = ("loss.",)  # the discriminator of the training
_PIXELS_AT_ONCE = 1 << 20  # a map of the finest layer takes 512 MB in float32


@dataclass(frozen=True)
class VQShape:
    """Sizes of the autoencoder.

    Attributes:
        num_codes: entries of the codebook.
        code_dim: channels of an entry.
        latent_channels: of the maps between encoder or decoder and codebook.
        base_channels: of the maps at full size, times the first multiplier.
        channel_multiplier: of each level, the finest first; from one to the next, a map's side is halved.
        num_res_blocks: of the encoder's levels; the decoder's have one more.
        resolution: pixels of the training pictures' side.
        attn_resolutions: sides of maps, for pictures of `resolution`, with attention behind each block.
    """

    num_codes: int
    code_dim: int
    latent_channels: int
    base_channels: int
    channel_multiplier: tuple[int, ...]
    num_res_blocks: int
    resolution: int
    attn_resolutions: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3

    @property
    def pixels_per_code(self) -> int:
        """Along a side."""
        return int(2 ** (len(self.channel_multiplier) - 1))


def vq_shape(path: Path, config: ChameleonConfig) -> VQShape:
    """From vqgan.yaml if it is there, else from the config's `vq_config`. Raises ValueError where they lack a field."""
    file = vqgan_file(path, ".yaml")
    try:
        if file is None:
            fields = config.vq_config.to_dict()
            renamed = fields
        else:
            fields = yaml.safe_load(file.read_text())["model"]["params"]
            renamed = {**fields["ddconfig"], "num_embeddings": fields["n_embed"], "embed_dim": fields["embed_dim"]}
            for own, other in (
                ("double_latent", "double_z"),
                ("latent_channels", "z_channels"),
                ("base_channels", "ch"),
                ("channel_multiplier", "ch_mult"),
                ("out_channels", "out_ch"),
            ):
                renamed[own] = renamed[other]
        return _shape(renamed)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file or 'vq_config'} lacks or garbles a field of the VQ autoencoder: {error}") from error


def _shape(fields: Mapping[str, Any]) -> VQShape:
    if fields.get("double_latent") or fields.get("attn_type", "vanilla") != "vanilla":
        raise ValueError("the VQ autoencoder must have single latents and vanilla attention")
    return VQShape(
        num_codes=fields["num_embeddings"],
        code_dim=fields["embed_dim"],
        latent_channels=fields["latent_channels"],
        base_channels=fields["base_channels"],
        channel_multiplier=tuple(fields["channel_multiplier"]),
        num_res_blocks=fields["num_res_blocks"],
        resolution=fields["resolution"],
        attn_resolutions=tuple(fields.get("attn_resolutions") or ()),
        in_channels=fields.get("in_channels", 3),
        out_channels=fields.get("out_channels", 3),
    )


class ResnetBlock(nn.Module):
    """Two convolutions beside a path that changes the number of channels at most."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels_in), _norm(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, h, w] -> [B, channels_out, h, w]."""
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        out: Tensor = self.nin_shortcut(x) + inner
        return out


class AttnBlock(nn.Module):
    """Every position of a map looks at every other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape."""
        normed = self.norm(x)
        query, key, value = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = pixel_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(attended)
        return out


class Middle(nn.Module):
    """The coarsest maps: block, attention, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape."""
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Downsample(nn.Module):
    """Halves the sides; the padding is at the right and the lower edge alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h / 2, w / 2]."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the sides by repeating each number, and smooths."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, 2 h, 2 w]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """Blocks on maps of one size, each with attention behind it or none with, and a change of size at the end."""

    def __init__(self, channels: list[int], has_attention: bool, resample: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.block = nn.ModuleList(ResnetBlock(before, after) for before, after in pairs)
        self.attn = nn.ModuleList(AttnBlock(after) for _, after in pairs if has_attention)
        self._resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels[0], h, w] -> [B, channels[-1], h', w']."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return self.get_submodule(self._resample)(x) if self._resample else x


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to latents [B, C, h, w]."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(shape.in_channels, shape.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        last = len(shape.channel_multiplier) - 1
        before, side = shape.base_channels, shape.resolution
        for index, multiplier in enumerate(shape.channel_multiplier):
            after = shape.base_channels * multiplier
            resample = ("downsample", Downsample(after)) if index < last else None
            channels = [before, *[after] * shape.num_res_blocks]
            self.down.append(Level(channels, side in shape.attn_resolutions, resample))
            before, side = after, side // 2
        self.mid = Middle(before)
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, shape.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Latents [B, C, h, w] to pixels [B, 3, H, W], about [-1, 1]."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        last = len(shape.channel_multiplier) - 1
        before, side = shape.base_channels * shape.channel_multiplier[-1], shape.resolution >> last
        self.conv_in = nn.Conv2d(shape.latent_channels, before, 3, padding=1)
        self.mid = Middle(before)
        levels: list[Level] = []
        for index in range(last, -1, -1):
            after = shape.base_channels * shape.channel_multiplier[index]
            resample = ("upsample", Upsample(after)) if index else None
            channels = [before, *[after] * (shape.num_res_blocks + 1)]
            levels.append(Level(channels, side in shape.attn_resolutions, resample))
            before, side = after, side * 2
        self.up = nn.ModuleList(reversed(levels))  # the names count from the finest
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, shape.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Codebook(nn.Module):
    """The vectors of the codes."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.num_codes, shape.code_dim)


class ChameleonVQ(nn.Module):
    """Codes to pixels and back, float32."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        self.quantize = Codebook(shape)
        self.quant_conv = nn.Conv2d(shape.latent_channels, shape.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(shape.code_dim, shape.latent_channels, 1)

    @classmethod
    def from_checkpoint(cls, path: Path, shape: VQShape) -> ChameleonVQ:
        """From the files that this module's docstring lists. Raises ValueError that says what is missing, and where."""
        problems = vq_problems(path, shape)
        if problems:
            raise ValueError(f"the pixel decoder of {path} cannot be used: " + "; ".join(problems))
        files, prefix = vq_files(path)
        with torch.device("meta"):
            model = cls(shape).eval()
        names = {prefix + name for name in model.state_dict()}
        weights = {name.removeprefix(prefix): tensor.float() for name, tensor in read_tensors(files, names)}
        model.load_state_dict(weights, assign=True)
        return model

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes long [B, rows, columns], any number of rows -> pixels [B, 3, height, width], about [-1, 1]."""
        pixels = codes.shape[1] * codes.shape[2] * self.shape.pixels_per_code**2
        return torch.cat(
            [self._decode(few).cpu() for few in torch.split(codes, max(1, _PIXELS_AT_ONCE // max(1, pixels)))]
        )

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, height, width] in [-1, 1] -> the nearest codes, long [B, rows, columns]."""
        latents = self.quant_conv(self.encoder(pixels)).movedim(1, -1)
        vectors = self.quantize.embedding.weight
        # |z - e|^2 without |z|^2, which is the same for all entries
        distances = torch.addmm(vectors.square().sum(1), latents.flatten(0, 2), vectors.T, alpha=-2)
        return distances.argmin(1).view(latents.shape[:-1])

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = self.quantize.embedding(codes).movedim(-1, 1).contiguous()
        out: Tensor = self.decoder(self.post_quant_conv(vectors))
        return out


def vq_files(path: Path) -> tuple[list[Path], str]:
    """The files that hold the autoencoder, and how its tensors' names begin there."""
    own = vqgan_file(path, ".ckpt")
    return ([own], "") if own is not None else (weight_files(path), VQ_PREFIX)


def vq_problems(path: Path, shape: VQShape, checkpoint: Mapping[str, Shape] | None = None) -> list[str]:
    """What is wrong with the autoencoder's tensors, from the headers of the files.

    Args:
        checkpoint: name and shape of the checkpoint's own tensors, if they are known.
    """
    files, prefix = vq_files(path)
    try:
        found = checkpoint if prefix and checkpoint is not None else tensor_shapes(files)
    except ValueError as error:
        return [str(error)]
    found = {name.removeprefix(prefix): one for name, one in found.items() if name.startswith(prefix)}
    if not any(name.startswith("decoder.") for name in found):
        return [f"the pixel decoder is missing: {WHERE}"]
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in ChameleonVQ(shape).state_dict().items()}
    where = "" if prefix else f"{files[0].name}: "
    return [where + problem for problem in differences(expected, found, surplus=_UNUSED)]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)
