"""Prompts of LlamaGen: a class, or a caption that a T5 has read.

Class-conditional: the one token of the prompt is the class, the unconditional one is the number behind the last class
(FoundationVision/LlamaGen, autoregressive/models/generate.py, `generate`).

From text (autoregressive/sample/sample_t2i.py): the cleaned caption is cut to 120 tokens, and the features of
its own tokens, projected, are the prompt. The unconditional prompt is the learned one, padded where the caption is, so
of its 120 rows the last ones are left, as many as the caption has. The authors' code leads away from nothing else
(`generate`: `cond_null` is `cls_embedding.uncond_embedding`), so there is no negative prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd_vllm.config import ConfigError, nearest_name
from sjd_vllm.models.llamagen.layout import TEXT_ENCODER, LlamaGenShape, transformer_file
from sjd_vllm.models.tensors import read_tensors

# Cleaning takes time that grows with the square of a caption's longest word; 120 tokens are some 600 characters.
MAX_CAPTION_CHARACTERS = 4000
_IMAGENET_CLASSES = 1000


def project_captions(features: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The caption embedder's `cap_proj`: features [L, caption_dim] -> [L, dim], in float32."""
    first = tensors["cls_embedding.cap_proj.fc1.weight"].float()
    second = tensors["cls_embedding.cap_proj.fc2.weight"].float()
    return F.linear(F.gelu(F.linear(features.float(), first), approximate="tanh"), second)


class ClassPrompts:
    """Classes by number or, where there are ImageNet's 1000, by name."""

    def __init__(self, shape: LlamaGenShape) -> None:
        self._first = shape.num_codes
        self._num_classes = shape.num_labels - 1

    def conditional(self, prompt: str) -> list[int]:
        """The id of a class. Raises ConfigError for one that is not known, or for a name of several."""
        text = prompt.strip().lower()
        if text.isascii() and text.isdigit():
            number = int(text)
            if number >= self._num_classes:
                raise ConfigError(
                    "prompt", f"classes go from 0 to {self._num_classes - 1}; got {number}, and this model has no more."
                )
            return [self._first + number]
        named = imagenet_classes() if self._num_classes == _IMAGENET_CLASSES else {}
        numbers = named.get(text, ())
        if len(numbers) != 1:
            several = f"{prompt!r} names the classes {', '.join(map(str, numbers))}; give the number."
            hint = " or a name of ImageNet's 1000" if named else ""
            unknown = (
                f"the prompt of this model is a class: a number from 0 to {self._num_classes - 1}{hint}; "
                f"got {prompt!r}.{nearest_name(text, named)}"
            )
            raise ConfigError("prompt", several if numbers else unknown)
        return [self._first + numbers[0]]

    def unconditional(self) -> list[int]:
        """The id that stands for no class."""
        return [self._first + self._num_classes]


class CaptionPrompts:
    """Captions read by the T5 in the checkpoint's folder, in float32."""

    def __init__(self, path: Path, shape: LlamaGenShape) -> None:
        self._path = path
        self._shape = shape

    def conditional(self, caption: str) -> list[int]:
        """An id for each vector that the caption brings. Raises ConfigError for a caption that is too long to clean."""
        return [self._shape.num_codes + self._shape.num_caption_rows] * len(self._token_ids(caption))

    def unconditional(self, num_rows: int) -> list[int]:
        """The last rows of the learned caption."""
        end = self._shape.num_codes + self._shape.num_caption_rows
        return list(range(end - num_rows, end))

    def vectors(self, caption: str, device: torch.device) -> Tensor:
        """float32 [L, dim] on the CPU: the projected features, a row for each id of `conditional`.

        Args:
            device: where the T5 runs; it moves there the first time.
        """
        token_ids = torch.tensor([self._token_ids(caption)], device=device)
        encoder = self._encoder.to(device)
        with torch.inference_mode():
            features = encoder(input_ids=token_ids).last_hidden_state[0]
            return project_captions(features.cpu(), self._projection)

    def problems(self) -> list[str]:
        """What is wrong with the folder of the text encoder."""
        folder = self._path / TEXT_ENCODER
        try:
            import bs4  # noqa: F401
            import ftfy  # noqa: F401
            from transformers import AutoConfig

            width = AutoConfig.from_pretrained(folder, local_files_only=True).d_model
            if width != self._shape.caption_dim:
                return [f"the text encoder in {folder} is {width} wide; the model reads {self._shape.caption_dim}"]
            self._tokenizer  # noqa: B018
        except ImportError as error:
            return [f"captions need the package {error.name}; install sjd-vllm[llamagen]"]
        except Exception as error:
            return [
                f"the text encoder, google/{TEXT_ENCODER} of huggingface.co, is looked for in {folder} and cannot be "
                f"used: {error}"
            ]
        return []

    def _token_ids(self, caption: str) -> list[int]:
        from sjd_vllm.models.llamagen.captions import clean_caption

        if len(caption) > MAX_CAPTION_CHARACTERS:
            raise ConfigError(
                "prompt",
                f"the prompt has {len(caption)} characters; at most {MAX_CAPTION_CHARACTERS} are taken, and the model "
                f"reads no more than {self._shape.num_caption_rows} tokens.",
            )
        ids: list[int] = self._tokenizer(
            clean_caption(caption), max_length=self._shape.num_caption_rows, truncation=True, add_special_tokens=True
        )["input_ids"]
        return ids

    @cached_property
    def _tokenizer(self):  # type: ignore[no-untyped-def]
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._path / TEXT_ENCODER, local_files_only=True)

    @cached_property
    def _encoder(self):  # type: ignore[no-untyped-def]
        from transformers import T5EncoderModel

        return T5EncoderModel.from_pretrained(
            self._path / TEXT_ENCODER, dtype=torch.float32, local_files_only=True
        ).eval()

    @cached_property
    def _projection(self) -> dict[str, Tensor]:
        tensors = read_tensors([transformer_file(self._path)])
        return {name: tensor for name, tensor in tensors if name.startswith("cls_embedding.cap_proj.")}


@cache
def imagenet_classes() -> dict[str, list[int]]:
    """Numbers of the classes that have a name, lower case; the list is tools/imagenet_en_cn.py of the authors."""
    text = files("sjd_vllm.models.llamagen").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    numbers: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines()):
        for name in (line, *line.split(",")):
            known = numbers.setdefault(name.strip().lower(), [])
            if number not in known:
                known.append(number)
    return numbers
