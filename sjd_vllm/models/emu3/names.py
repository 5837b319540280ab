"""Names of the tensors of an Emu3 checkpoint, in the published layouts.

The language model has Llama's names in BAAI's release and two sets of names in Hugging Face conversions: those of the
first release of Transformers that knew Emu3 (text_model.model.*, as published in BAAI/Emu3-Gen-hf) and those that it
writes now (model.text_model.*). The vision tokenizer's follow Transformers' convert_emu3_weights_to_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sjd_vllm.models.tensors import Shape


@dataclass(frozen=True)
class _Naming:
    text: str  # in place of Llama's "model."
    head: str
    vq: str  # in front of the names of Transformers' Emu3VQVAE


_ORIGINAL = _Naming("model.", "lm_head.weight", "")
_FIRST_CONVERTED = _Naming("text_model.model.", "text_model.lm_head.weight", "vqmodel.")
_CONVERTED = _Naming("model.text_model.", "lm_head.weight", "model.vqmodel.")
_HEAD = "lm_head.weight"

# Beginnings of published names -> Llama's
OWN_PREFIXES = {
    _FIRST_CONVERTED.text: _ORIGINAL.text,
    "text_model.lm_head.": "lm_head.",
    _CONVERTED.text: _ORIGINAL.text,
}
VQ_PREFIXES = (_FIRST_CONVERTED.vq, _CONVERTED.vq)


def own_name(name: str) -> str:
    """Published name of a tensor of the language model -> Llama's."""
    for prefix, own in OWN_PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def published_text(shapes: Mapping[str, Shape], names: Iterable[str]) -> dict[str, Shape]:
    """Llama's names -> those that a checkpoint with some of these names has."""
    naming = _naming(names)
    return {
        naming.head if name == _HEAD else naming.text + name.removeprefix(_ORIGINAL.text): shape
        for name, shape in shapes.items()
    }


def published_vq(shapes: Mapping[str, Shape], names: Iterable[str]) -> dict[str, tuple[str, Shape]]:
    """Names of Transformers' Emu3VQVAE -> published name and shape, in a checkpoint with some of these names."""
    naming = _naming(names)
    if naming is not _ORIGINAL:
        return {name: (naming.vq + name, shape) for name, shape in shapes.items()}
    return {name: _original_vq(name, shape) for name, shape in shapes.items()}


def _naming(names: Iterable[str]) -> _Naming:
    names = list(names)
    for naming in (_FIRST_CONVERTED, _CONVERTED):
        if any(name.startswith((naming.text, naming.vq)) for name in names):
            return naming
    return _ORIGINAL


def _original_vq(name: str, shape: Shape) -> tuple[str, Shape]:
    """Attention blocks own their norm there, and project by convolutions of 1 x 1."""
    name = name.replace(".middle_block.", ".mid.").replace(".down_block.", ".").replace(".up_block.", ".")
    name = name.replace(".mid.attn_norm.", ".mid.attn_1.norm.")
    name = re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", name)
    name, is_projection = re.subn(r"\.(q|k|v)_proj\.", r".\1.", name)
    if not is_projection:
        name, is_projection = re.subn(r"\.out_proj\.", ".proj_out.", name)
    return name, (*shape, 1, 1) if is_projection and len(shape) == 2 else shape
