"""Names and shapes of the tensors of a Janus checkpoint, in both published layouts.

Sources: DeepSeek's janus/models/modeling_vlm.py, projector.py and vq_model.py for the original names; Transformers'
models/janus/convert_janus_weights_to_hf.py for how they were converted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sjd_vllm.models.janus.config import JanusShape
from sjd_vllm.models.llama_weights import llama_shapes
from sjd_vllm.models.tensors import Shape

# Parts that understand pictures, and are not served; the counter of codes that training kept.
_UNUSED = {
    True: ("vision_model.", "aligner.", "gen_vision_model.quantize.codebook_used"),
    False: ("model.vision_model.", "model.aligner."),
}
_MOST_ALIGNER_LAYERS = 16  # published: 2

# Layers, or beginnings of their names, in either layout -> those of `JanusForImageGeneration`
OWN_LAYERS = {
    "language_model.model": "model",
    "language_model.lm_head": "lm_head",
    "gen_embed": "model.gen_embed",
    **{f"gen_aligner.layers.{2 * index}": f"model.gen_aligner.{index}" for index in range(_MOST_ALIGNER_LAYERS)},
    "gen_head.output_mlp_projector": "gen_head.proj",
    "gen_head.vision_head": "gen_head.codes",
    "model.language_model": "model",
    "model.generation_embeddings": "model.gen_embed",
    "model.generation_aligner.fc1": "model.gen_aligner.0",
    **{
        f"model.generation_aligner.hidden_layers.{index - 1}": f"model.gen_aligner.{index}"
        for index in range(1, _MOST_ALIGNER_LAYERS)
    },
    "model.generation_head.proj_out": "gen_head.proj",
    "model.generation_head.vision_head": "gen_head.codes",
}
_VQ_PREFIX = {True: "gen_vision_model.", False: "model.vqmodel."}


@dataclass(frozen=True)
class Published:
    """How a tensor is called in the checkpoint, and its shape there."""

    name: str
    shape: Shape


def unused_names(shape: JanusShape) -> tuple[str, ...]:
    """Names, or beginnings of names that end with a dot, that a checkpoint may have and nothing here reads."""
    return _UNUSED[shape.is_original]


def is_known(name: str) -> bool:
    """Whether a tensor says anything; rotary frequencies, which old releases of Transformers saved, do not."""
    return not name.endswith(".rotary_emb.inv_freq")


def own_name(name: str) -> str:
    """Published name of a tensor or layer, in either layout -> the model's own; what is not served keeps its name."""
    for published, own in OWN_LAYERS.items():
        if name == published or name.startswith(f"{published}."):
            return own + name.removeprefix(published)
    return name


def vq_prefix(shape: JanusShape) -> str:
    """What the names of the VQ autoencoder's tensors begin with."""
    return _VQ_PREFIX[shape.is_original]


def language_tensors(shape: JanusShape) -> dict[str, Published]:
    """What `JanusForImageGeneration` reads: its own parameter name (unmerged) -> the published one."""
    is_original, hidden = shape.is_original, shape.hidden_size
    out = {
        name: Published(_llama_name(name, is_original), tensor)
        for name, tensor in llama_shapes({**shape.text, "tie_word_embeddings": not shape.has_lm_head}).items()
    }
    name = "gen_embed.weight" if is_original else "model.generation_embeddings.weight"
    out["model.gen_embed.weight"] = Published(name, (shape.num_codes, shape.code_dim))
    for index in range(shape.aligner_depth):
        converted = "fc1" if index == 0 else f"hidden_layers.{index - 1}"
        prefix = f"gen_aligner.layers.{2 * index}" if is_original else f"model.generation_aligner.{converted}"
        _add_linear(out, f"model.gen_aligner.{index}", prefix, shape.code_dim if index == 0 else hidden, hidden)
    prefix = "gen_head.output_mlp_projector" if is_original else "model.generation_head.proj_out"
    _add_linear(out, "gen_head.proj", prefix, hidden, shape.head_dim)
    prefix = "gen_head.vision_head" if is_original else "model.generation_head.vision_head"
    _add_linear(out, "gen_head.codes", prefix, shape.head_dim, shape.num_codes)
    return out


def vq_tensors(shape: JanusShape, parameters: dict[str, Shape]) -> dict[str, Published]:
    """The autoencoder's parameters by the names that Transformers' JanusVQVAE gives them -> the published ones."""
    prefix = vq_prefix(shape)
    return {
        name: Published(prefix + (_original_vq_name(name) if shape.is_original else name), tensor)
        for name, tensor in parameters.items()
    }


def _llama_name(name: str, is_original: bool) -> str:
    if is_original:
        return f"language_model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def _add_linear(out: dict[str, Published], own: str, published: str, fan_in: int, fan_out: int) -> None:
    out[f"{own}.weight"] = Published(f"{published}.weight", (fan_out, fan_in))
    out[f"{own}.bias"] = Published(f"{published}.bias", (fan_out,))


def _original_vq_name(name: str) -> str:
    name = re.sub(r"^(encoder\.down|decoder\.up)\.", lambda part: part[1].split(".")[0] + ".conv_blocks.", name)
    name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
    for index, middle in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{middle}.", f".mid.{index}.")
    return name
