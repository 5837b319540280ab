"""What a family of image-token models must say: sizes, grammar, prompts, sampling defaults, pixels.

A family is found from the checkpoint's own config (`sjd_vllm.models.registry`). Building one reads config files only;
the tokenizer and the pixel decoder are loaded when first used, so an engine worker that needs the grammar alone stays
small.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd_vllm.models.grammar import ImageGrammar

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, order=True)
class ImageSize:
    """A picture's size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling settings that a family's authors (or we, for the demo) recommend."""

    temperature: float
    top_k: int  # 0 is off
    top_p: float
    guidance_scale: float


@dataclass(frozen=True)
class DecoderShape:
    """The figures of a decoder-only transformer that say what memory and how many positions it has."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # tokens of the longest sequence, prompt included
    vocab_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderShape:
        """From a Hugging Face config (or its "text_config"). Raises ValueError for a field that it lacks."""
        config = config.get("text_config") or config
        names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings", "vocab_size")
        for name in names:
            if not isinstance(config.get(name), int):
                raise ValueError(f"the config lacks {name}")
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_positions=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
        )

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_number


class ImageFamily(ABC):
    """One family of checkpoints.

    Attributes:
        path: the checkpoint's folder.
        name: the family's short name.
        sizes: the picture sizes that the model can make, the default first.
        defaults: recommended sampling settings.
        shape: of the decoder.
        examples: prompts that show what the model can do; may be empty.
        can_encode: whether `encode_pixels` works, so that a picture can start from the rows of a given one.
        engine_args: fields of vLLM's EngineArgs that this checkpoint needs, where the user has left them alone.
        embedded_token_id: the id in a prompt for which `prompt_embeds` brings a vector; None if there is none.
        pixel_device: where pixels are decoded and encoded and `prompt_embeds` is computed. Front doors choose it; one
            that changes it waits until nothing of that is under way.
    """

    path: Path
    name: str
    sizes: tuple[ImageSize, ...]
    defaults: SamplingDefaults
    shape: DecoderShape
    examples: tuple[str, ...] = ()
    can_encode: bool = False
    engine_args: Mapping[str, Any] = {}
    embedded_token_id: int | None = None
    pixel_device: torch.device = torch.device("cpu")

    @abstractmethod
    def grammar(self, size: ImageSize) -> ImageGrammar:
        """The token sequence of a picture of one of `sizes`; the same object each time for one size."""

    @abstractmethod
    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        """The conditional prompt, up to and including the begin-of-image tokens."""

    def prompt_embeds(self, prompt: str, size: ImageSize) -> Tensor | None:
        """float32 [L, hidden size]: vectors for all L tokens of the conditional prompt, where ids do not say enough.

        Each id of `prompt_token_ids` is then `embedded_token_id`. None, as it mostly is: the ids are all.
        """
        return None

    @abstractmethod
    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        """The unconditional prompt; None is the family's own empty one."""

    def unconditional_token_ids(self, prompt_token_ids: list[int], size: ImageSize) -> list[int]:
        """The unconditional prompt where none is asked for; a family whose own depends on the prompt overrides it."""
        return self.negative_prompt_token_ids(None, size)

    @abstractmethod
    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        """uint8 [N, height, width, 3] from N pictures' tokens; each must hold the same number of whole rows.

        With fewer rows than a picture has, the height is that of the rows given.
        """

    def encode_pixels(self, pixels: Pixels, size: ImageSize) -> Tensor:
        """Codebook indices, long [rows, columns], of a picture uint8 [height, width, 3] of that size."""
        raise NotImplementedError(f"the family {self.name} has no encoder for pictures")

    def weight_files(self) -> list[Path]:
        """The files that hold weights, those of the pixel decoder included where it is in the folder."""
        kinds = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
        return sorted(file for file in self.path.rglob("*") if file.suffix in kinds and file.is_file())

    def problems(self) -> list[str]:
        """What is wrong with the weights in the folder, one line each, from the headers of its files alone.

        A tensor that is missing, of another shape than the config says, or not known; a missing file of the tokenizer
        or the pixel decoder.
        """
        return [] if any(self.path.glob("*.safetensors")) else ["there are no weights (*.safetensors)"]

    def size(self, text: str | None) -> ImageSize:
        """The size named "WIDTHxHEIGHT", or the default for None. Raises ValueError that lists the sizes."""
        if text is None:
            return self.sizes[0]
        for size in self.sizes:
            if str(size) == text:
                return size
        known = ", ".join(map(str, self.sizes))
        raise ValueError(f"size must be one of {known}; got {text!r}.")
