"""The scorer: a small CNN that reads a scene's attributes off a picture, one head per attribute.

It was trained on real pictures and on their VQ reconstructions, so that the blur of the autoencoder does not count as
a mistake of the decoder.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sjd_vllm.demo.captions import ATTRIBUTES


@dataclass(frozen=True)
class ScorerConfig:
    """Size of the scorer.

    Attributes:
        channels: of the four stages; each halves the resolution.
        hidden: width of the layer before the heads.
    """

    channels: tuple[int, ...] = (24, 48, 64, 64)
    hidden: int = 96


class Scorer(nn.Module):
    """Pixels to logits of every attribute."""

    def __init__(self, config: ScorerConfig | None = None) -> None:
        super().__init__()
        self.config = config or ScorerConfig()
        widths = (3, *self.config.channels)
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )
        # 96 / 2^4 = 6 positions a side: places are told apart by position, so the map is not averaged away.
        self.hidden = nn.Linear(widths[-1] * 36, self.config.hidden)
        self.heads = nn.ModuleDict({name: nn.Linear(self.config.hidden, len(v)) for name, v in ATTRIBUTES.items()})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Scorer":
        """Load `config.json` and `model.safetensors`; float32, in evaluation mode."""
        folder = Path(folder)
        scorer = cls(ScorerConfig(**json.loads((folder / "config.json").read_text())))
        scorer.load_state_dict(load_file(folder / "model.safetensors"))
        return scorer.float().eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (float16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        weights = {name: tensor.detach().half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """float [B, 3, 96, 96] in [-1, 1] to logits [B, number of values] of each attribute."""
        for stage in self.stages:
            pixels = F.gelu(stage(pixels))
        hidden = F.gelu(self.hidden(pixels.flatten(1)))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """Most likely class of each attribute: int64 [B, 7], in the order of `ATTRIBUTES`."""
        return torch.stack([logits.argmax(1) for logits in self(pixels).values()], 1)


def accuracies(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right answers per attribute, and their mean.

    Args:
        predicted: int64 [B, 7] from `Scorer.classify`.
        labels: int64 [B, 7] from `Scene.labels`; -1, an object that is not there, is left out of the count.
    """
    is_right = (predicted == labels).double()
    is_counted = (labels >= 0).double()
    shares = (is_right * is_counted).sum(0) / is_counted.sum(0)
    per_attribute: Mapping[str, float] = dict(zip(ATTRIBUTES, shares.tolist(), strict=True))
    return {**per_attribute, "mean": float(shares.mean())}
