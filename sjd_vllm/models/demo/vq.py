"""The VQ autoencoder of the demo model: 96 x 96 pixels to 16 x 16 codes and back.

Shapes: B pictures, G x G grid of codes, P = 6 pixels per code and side, C channels of a code vector, K codes.
There is no normalisation over space, so decoding some rows of codes gives the same pixels as decoding all of them,
up to the reach of the convolutions at the cut.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

_SUBPIXELS = 3  # the fine maps have one position per 3 x 3 pixels, the coarse maps one per 6 x 6


@dataclass(frozen=True)
class DemoVQConfig:
    """Sizes of the autoencoder.

    Attributes:
        num_codes: K, entries of the codebook.
        code_dim: C, channels of a code vector.
        fine_channels: channels of the maps with one position per 3 x 3 pixels.
        coarse_channels: channels of the maps with one position per 6 x 6 pixels.
        num_encoder_blocks: residual blocks of the encoder on the coarse maps.
        num_decoder_blocks: residual blocks of the decoder on the coarse maps.
        pixel_channels: channels of the decoder's maps at full resolution.
    """

    num_codes: int = 1024
    code_dim: int = 16
    fine_channels: int = 64
    coarse_channels: int = 128
    num_encoder_blocks: int = 2
    num_decoder_blocks: int = 3
    pixel_channels: int = 16


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        assert self.second.bias is not None
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))  # type: ignore[no-any-return]


class Encoder(nn.Sequential):
    """Pixels [B, 3, H, W] to latents [B, C, H / 6, W / 6]."""

    def __init__(self, config: DemoVQConfig) -> None:
        fine, coarse = config.fine_channels, config.coarse_channels
        super().__init__(
            nn.PixelUnshuffle(_SUBPIXELS),
            nn.Conv2d(3 * _SUBPIXELS**2, fine, 3, padding=1),
            ResidualBlock(fine),
            nn.Conv2d(fine, coarse, 4, stride=2, padding=1),
            *(ResidualBlock(coarse) for _ in range(config.num_encoder_blocks)),
            nn.Conv2d(coarse, config.code_dim, 1),
        )


class Decoder(nn.Sequential):
    """Code vectors [B, C, h, w] to pixels [B, 3, 6 h, 6 w], not yet clipped to [-1, 1]."""

    def __init__(self, config: DemoVQConfig) -> None:
        fine, coarse, pixel = config.fine_channels, config.coarse_channels, config.pixel_channels
        super().__init__(
            nn.Conv2d(config.code_dim, coarse, 3, padding=1),
            *(ResidualBlock(coarse) for _ in range(config.num_decoder_blocks)),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            ResidualBlock(fine),
            ResidualBlock(fine),
            nn.SiLU(),
            nn.Conv2d(fine, pixel * _SUBPIXELS**2, 3, padding=1),
            nn.PixelShuffle(_SUBPIXELS),
            nn.SiLU(),
            nn.Conv2d(pixel, 3, 3, padding=1),
        )


class DemoVQ(nn.Module):
    """Encoder, codebook and decoder."""

    codebook: Tensor

    def __init__(self, config: DemoVQConfig | None = None) -> None:
        super().__init__()
        self.config = config or DemoVQConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        # A buffer: the codebook follows the latents by moving averages, not by gradients.
        self.register_buffer("codebook", torch.randn(self.config.num_codes, self.config.code_dim))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DemoVQ":
        """Load `config.json` and `model.safetensors`; float32, in evaluation mode."""
        folder = Path(folder)
        model = cls(DemoVQConfig(**json.loads((folder / "config.json").read_text())))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.float().eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (float16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        weights = {name: tensor.detach().half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of pictures.

        Args:
            pixels: float [B, 3, H, W] in [-1, 1]; H and W are multiples of 6.

        Returns:
            int64 [B, H / 6, W / 6] in [0, K).
        """
        return self.nearest(self.encoder(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of codes; any number of rows, so that a picture can be shown while it grows.

        Args:
            codes: int64 [B, h, w] in [0, K).

        Returns:
            float [B, 3, 6 h, 6 w] in [-1, 1].
        """
        return self.decoder(self.vectors(codes)).clamp(-1, 1)  # type: ignore[no-any-return]

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest codebook entry: latents [B, C, h, w] to int64 [B, h, w]."""
        flat = latents.movedim(1, -1).float()
        # |z - e|^2 without |z|^2, which is the same for all entries
        norms = self.codebook.square().sum(1)
        distances = torch.addmm(norms, flat.flatten(0, 2), self.codebook.T, alpha=-2)
        return distances.argmin(-1).view(flat.shape[:-1])

    def vectors(self, codes: Tensor) -> Tensor:
        """Codebook entries: int64 [B, h, w] to float [B, C, h, w]."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)
