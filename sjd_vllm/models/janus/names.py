"""Names and shapes of the tensors of a Janus checkpoint, in both published layouts.

Sources: DeepSeek's janus/models/modeling_vlm.py, projector.py and vq_model.py for the original names; Transformers'
models/janus/convert_janus_weights_to_hf.py for how they were converted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

# Layers, or beginnings of their names: those of `JanusForImageGeneration` -> the original's, Transformers'. The first
# that fits a name counts.
_LAYERS = {
    "model.gen_embed": ("gen_embed", "model.generation_embeddings"),
    "model.gen_aligner.0": ("gen_aligner.layers.0", "model.generation_aligner.fc1"),
    **{
        f"model.gen_aligner.{index}": (
            f"gen_aligner.layers.{2 * index}",
            f"model.generation_aligner.hidden_layers.{index - 1}",
        )
        for index in range(1, _MOST_ALIGNER_LAYERS)
    },
    "gen_head.proj": ("gen_head.output_mlp_projector", "model.generation_head.proj_out"),
    "gen_head.codes": ("gen_head.vision_head", "model.generation_head.vision_head"),
    "model": ("language_model.model", "model.language_model"),
    "lm_head": ("language_model.lm_head", "lm_head"),
}
# Those of either layout -> the model's own
OWN_LAYERS = {published: own for own, layouts in _LAYERS.items() for published in layouts}
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
    return _renamed(name, OWN_LAYERS)


def vq_prefix(shape: JanusShape) -> str:
    """What the names of the VQ autoencoder's tensors begin with."""
    return _VQ_PREFIX[shape.is_original]


def language_tensors(shape: JanusShape) -> dict[str, Published]:
    """What `JanusForImageGeneration` reads: its own parameter name (unmerged) -> the published one."""
    tensors = llama_shapes({**shape.text, "tie_word_embeddings": not shape.has_lm_head})
    tensors["model.gen_embed.weight"] = (shape.num_codes, shape.code_dim)
    for index in range(shape.aligner_depth):
        fan_in = shape.hidden_size if index else shape.code_dim
        tensors |= _linear(f"model.gen_aligner.{index}", fan_in, shape.hidden_size)
    tensors |= _linear("gen_head.proj", shape.hidden_size, shape.head_dim)
    tensors |= _linear("gen_head.codes", shape.head_dim, shape.num_codes)
    published_layers = {own: layouts[0 if shape.is_original else 1] for own, layouts in _LAYERS.items()}
    return {own: Published(_renamed(own, published_layers), tensor) for own, tensor in tensors.items()}


def vq_tensors(shape: JanusShape, parameters: dict[str, Shape]) -> dict[str, Published]:
    """The autoencoder's parameters by the names that Transformers' JanusVQVAE gives them -> the published ones."""
    prefix = vq_prefix(shape)
    return {
        name: Published(prefix + (_original_vq_name(name) if shape.is_original else name), tensor)
        for name, tensor in parameters.items()
    }


def _linear(name: str, fan_in: int, fan_out: int) -> dict[str, Shape]:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _renamed(name: str, layers: Mapping[str, str]) -> str:
    for before, after in layers.items():
        if name == before or name.startswith(f"{before}."):
            return after + name.removeprefix(before)
    return name


def _original_vq_name(name: str) -> str:
    name = re.sub(r"^(encoder\.down|decoder\.up)\.", lambda part: part[1].split(".")[0] + ".conv_blocks.", name)
    name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
    for index, middle in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{middle}.", f".mid.{index}.")
    return name
