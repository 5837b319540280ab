"""What a family of image-token models must say: sizes, grammar, prompts, sampling defaults, pixels.

A family is found from the checkpoint's own config. Building one reads config files only; the tokenizer and
the pixel decoder are loaded when first used, so an engine worker that needs the grammar alone stays small.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from sjd_vllm.models.grammar import ImageGrammar

# family name -> module; imported only when a checkpoint names it
_FAMILIES = {"demo": "sjd_vllm.models.demo.family"}


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


class ImageFamily(ABC):
    """One family of checkpoints.

    Attributes:
        path: the checkpoint's folder.
        name: the family's short name.
        sizes: the picture sizes that the model can make, the default first.
        defaults: recommended sampling settings.
        examples: prompts that show what the model can do; may be empty.
    """

    path: Path
    name: str
    sizes: tuple[ImageSize, ...]
    defaults: SamplingDefaults
    examples: tuple[str, ...] = ()

    @abstractmethod
    def grammar(self, size: ImageSize) -> ImageGrammar:
        """The token sequence of a picture of one of `sizes`."""

    @abstractmethod
    def prompt_token_ids(self, prompt: str, size: ImageSize) -> list[int]:
        """The conditional prompt, up to and including the begin-of-image tokens."""

    @abstractmethod
    def negative_prompt_token_ids(self, negative_prompt: str | None, size: ImageSize) -> list[int]:
        """The unconditional prompt; None is the family's own empty one."""

    @abstractmethod
    def decode_pixels(self, token_ids: list[list[int]], size: ImageSize) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 [N, height, width, 3] from N pictures' tokens; each must hold the same number of whole rows.

        With fewer rows than a picture has, the height is that of the rows given.
        """

    def size(self, text: str | None) -> ImageSize:
        """The size named "WIDTHxHEIGHT", or the default for None. Raises ValueError that lists the sizes."""
        if text is None:
            return self.sizes[0]
        for size in self.sizes:
            if str(size) == text:
                return size
        known = ", ".join(map(str, self.sizes))
        raise ValueError(f"size must be one of {known}; got {text!r}.")


def load_family(path: str | Path) -> ImageFamily | None:
    """The family of the checkpoint in a folder, or None for a model that is not one of ours (plain text)."""
    config_path = Path(path) / "config.json"
    if not config_path.is_file():
        return None
    config = json.loads(config_path.read_text())
    name = (config.get("sjd") or {}).get("family")
    if name is None:
        return None
    if name not in _FAMILIES:
        raise ValueError(f"{config_path} names the family {name!r}; known are {', '.join(_FAMILIES)}.")
    family: ImageFamily = import_module(_FAMILIES[name]).load(Path(path), config)
    return family
