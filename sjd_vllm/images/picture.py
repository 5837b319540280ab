"""Finished pictures, and what is told about them in JSON and in a PNG's metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sjd_vllm import __version__
from sjd_vllm.images.request import PictureRequest


@dataclass(frozen=True)
class Picture:
    """A picture and how it came about.

    Attributes:
        request: what was asked for.
        image: the pixels.
        token_ids: the picture's tokens, given and forced ones included.
        tokens_per_step: tokens that each forward gave, the prompt's included; plain decoding gets one each.
        seconds: from entering the engine to the last token.
    """

    request: PictureRequest
    image: Image.Image
    token_ids: list[int]
    tokens_per_step: list[int]
    seconds: float

    @property
    def num_steps(self) -> int:
        """Forwards of the model that gave tokens."""
        return len(self.tokens_per_step)

    @property
    def step_compression(self) -> float:
        """New tokens per forward; 1 is plain decoding."""
        return self.request.num_new_tokens / self.num_steps

    def settings(self) -> dict[str, Any]:
        """What it takes to make the picture again, as plain JSON types."""
        request = self.request
        return {
            "prompt": request.prompt,
            "seed": request.seed,
            "size": str(request.size),
            "guidance_scale": request.sjd.guidance_scale,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "prompt_token_ids": request.prompt_token_ids,
            "given_token_ids": request.given_token_ids,
            "negative_prompt_token_ids": list(request.sjd.negative_prompt_token_ids),
        }

    def counts(self) -> dict[str, Any]:
        """How many tokens, forwards and seconds it took."""
        return {
            "num_tokens": self.request.num_new_tokens,
            "num_steps": self.num_steps,
            "step_compression": self.step_compression,
            "seconds": self.seconds,
        }

    def save(self, path: str | Path, **more_settings: Any) -> None:
        """Write a PNG with the settings in its text metadata, a chunk a setting (and `more_settings` beside them)."""
        info = PngInfo()
        info.add_text("Software", f"sjd-vllm {__version__}")
        for name, value in {**self.settings(), **more_settings, **self.counts()}.items():
            # iTXt: a prompt may be in any language
            info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
        self.image.save(path, format="PNG", pnginfo=info)


@dataclass(frozen=True)
class GenerationResult:
    """The pictures of one call, prompt by prompt in the order given."""

    pictures: list[Picture]
    seconds: float  # for all of them together

    @property
    def images(self) -> list[Image.Image]:
        """The pixels alone."""
        return [picture.image for picture in self.pictures]

    @property
    def num_steps(self) -> int:
        """Forwards over all pictures."""
        return sum(picture.num_steps for picture in self.pictures)

    @property
    def num_tokens(self) -> int:
        """New tokens over all pictures."""
        return sum(picture.request.num_new_tokens for picture in self.pictures)
