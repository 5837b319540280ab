"""Names and shapes of the tensors of a Janus checkpoint, in both published layouts.

Sources: DeepSeek's janus/models/modeling_vlm.py, projector.py and vq_model.py for the original names; Transformers'
models/janus/convert_janus_weights_to_hf.py for how they were converted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sjd_vllm.models.janus.config import JanusShape
from sjd_vllm.models.tensors import Shape

# Parts that understand pictures, and are not served; the counter of codes that training kept.
_UNUSED = {
    True: ("vision_model.", "aligner.", "gen_vision_model.quantize.codebook_used"),
    False: ("model.vision_model.", "model.aligner."),
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


def known_names(names: Iterable[str]) -> Iterator[str]:
    """Those names that say something: rotary frequencies, which old releases of Transformers saved, are left out."""
    return (name for name in names if not name.endswith(".rotary_emb.inv_freq"))


def language_tensors(shape: JanusShape) -> dict[str, Published]:
    """What `JanusForImageGeneration` reads: its own parameter name (unmerged) -> the published one."""
    is_original = shape.is_original
    hidden, text = shape.hidden_size, shape.text
    model = "language_model.model." if is_original else "model.language_model."
    heads, kv_heads = text["num_attention_heads"], text.get("num_key_value_heads") or text["num_attention_heads"]
    head_dim = text.get("head_dim") or hidden // heads
    mlp = text["intermediate_size"]
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * head_dim, hidden),
        "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    out = {
        "model.embed_tokens.weight": Published(f"{model}embed_tokens.weight", (shape.text_vocab_size, hidden)),
        "model.norm.weight": Published(f"{model}norm.weight", (hidden,)),
    }
    for index in range(text["num_hidden_layers"]):
        for name, tensor in layer.items():
            out[f"model.layers.{index}.{name}"] = Published(f"{model}layers.{index}.{name}", tensor)
    if shape.has_lm_head:
        name = "language_model.lm_head.weight" if is_original else "lm_head.weight"
        out["lm_head.weight"] = Published(name, (shape.text_vocab_size, hidden))
    name = "gen_embed.weight" if is_original else "model.generation_embeddings.weight"
    out["gen_embed.weight"] = Published(name, (shape.num_codes, shape.code_dim))
    for index in range(shape.aligner_depth):
        converted = "fc1" if index == 0 else f"hidden_layers.{index - 1}"
        prefix = f"gen_aligner.layers.{2 * index}" if is_original else f"model.generation_aligner.{converted}"
        _add_linear(out, f"gen_aligner.{index}", prefix, shape.code_dim if index == 0 else hidden, hidden)
    prefix = "gen_head.output_mlp_projector" if is_original else "model.generation_head.proj_out"
    _add_linear(out, "gen_head.proj", prefix, hidden, shape.head_dim)
    prefix = "gen_head.vision_head" if is_original else "model.generation_head.vision_head"
    _add_linear(out, "gen_head.codes", prefix, shape.head_dim, shape.num_codes)
    return out


def vq_tensors(shape: JanusShape, parameters: dict[str, Shape]) -> dict[str, Published]:
    """The autoencoder's parameters by the names that Transformers' JanusVQVAE gives them -> the published ones."""
    prefix = _VQ_PREFIX[shape.is_original]
    return {
        name: Published(prefix + (_original_vq_name(name) if shape.is_original else name), tensor)
        for name, tensor in parameters.items()
    }


def _add_linear(out: dict[str, Published], own: str, published: str, fan_in: int, fan_out: int) -> None:
    out[f"{own}.weight"] = Published(f"{published}.weight", (fan_out, fan_in))
    out[f"{own}.bias"] = Published(f"{published}.bias", (fan_out,))


def _original_vq_name(name: str) -> str:
    name = re.sub(r"^(encoder\.down|decoder\.up)\.", lambda part: part[1].split(".")[0] + ".conv_blocks.", name)
    name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
    for index, middle in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{middle}.", f".mid.{index}.")
    return name
