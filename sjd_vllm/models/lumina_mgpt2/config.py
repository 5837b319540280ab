"""The figures of a Lumina-mGPT 2.0 checkpoint and of its MoVQ, and the config that vLLM is given.

Sources: Alpha-VLLM/Lumina-mGPT-2.0, lumina_mgpt/model/chameleon/configuration_chameleon.py (fields and their defaults),
lumina_mgpt/data/item_processor.py (`get_image_token`, `generate_crop_size_list`, `patch_size`) and
lumina_mgpt/movqgan/__init__.py (`MODELS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sjd_vllm.models.family import DecoderShape
from sjd_vllm.models.llama_weights import llama_shapes
from sjd_vllm.models.tensors import Shape

ARCHITECTURE = "SJDLuminaMGPT2ForImageGeneration"
CONFIG_FORMAT = "sjd_lumina_mgpt2"
MOVQ_FILE = "movqgan/270M/movqgan_270M.ckpt"  # in the checkpoint's folder; the authors' place for it

PATCH = 32  # pixels of a side that a unit of the size tokens stands for

_IMAGE_TOKEN_START = 155000
_TARGET_SIZE = 768  # the README's table of checkpoints
_DEFAULTS = {
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_REFUSED = ("swin_norm", "attention_bias", "mlp_bias")


@dataclass(frozen=True)
class MoVQShape:
    """Sizes of the autoencoder; the defaults are those of movqgan_270M.

    Attributes:
        num_codes: entries of the codebook.
        code_dim: channels of a code's vector.
        latent_channels: channels between encoder or decoder and the codebook.
        base_channels: of the maps at full size.
        channel_multipliers: of each level, from full size down; every level but the last halves the map.
        num_res_blocks: of each level of the encoder; the decoder has one more.
        attention_levels: levels with attention, beside the middle.
    """

    num_codes: int = 16384
    code_dim: int = 4
    latent_channels: int = 4
    base_channels: int = 256
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3,)

    @classmethod
    def beside(cls, checkpoint: Path) -> MoVQShape:
        """From a config.json beside the file, in the terms of `MODELS[...]["model_params"]`; without one, the 270M."""
        file = (checkpoint / MOVQ_FILE).with_name("config.json")
        if not file.is_file():
            return cls()
        try:
            given = json.loads(file.read_text())
            ddconfig = given["ddconfig"]
            levels = range(len(ddconfig["ch_mult"]))
            resolutions = ddconfig["attn_resolutions"]
            return cls(
                num_codes=given["n_embed"],
                code_dim=given["embed_dim"],
                latent_channels=ddconfig["z_channels"],
                base_channels=ddconfig["ch"],
                channel_multipliers=tuple(ddconfig["ch_mult"]),
                num_res_blocks=ddconfig["num_res_blocks"],
                attention_levels=tuple(i for i in levels if ddconfig["resolution"] // 2**i in resolutions),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no config of a MoVQ: {error!r}") from error

    @property
    def pixels_per_code(self) -> int:
        """Of a side."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class LuminaShape:
    """What the tensors, the grammar and the sizes of a checkpoint follow from.

    Attributes:
        text: the language model, as arguments of Transformers' LlamaConfig.
        num_norm_groups: groups of heads that share the weights of a norm of queries or keys (`model_parallel_size`).
        image_token_start: token id of the codebook's first code.
        target_size: side of the largest square, in pixels.
        movq: of the pixel decoder.
    """

    text: dict[str, Any] = field(repr=False)
    num_norm_groups: int
    image_token_start: int
    target_size: int
    movq: MoVQShape


def is_lumina_mgpt2(config: dict[str, Any]) -> bool:
    """A Chameleon whose vocabulary reaches beyond MoVQ's ids; those of Chameleon and Lumina-mGPT 1 end at 65536."""
    vocab = config.get("vocab_size")
    is_chameleon = "chameleon" in str(config.get("model_type"))
    return is_chameleon and isinstance(vocab, int) and vocab >= _IMAGE_TOKEN_START + MoVQShape.num_codes


def lumina_shape(path: Path, config: dict[str, Any]) -> LuminaShape:
    """From config.json, and the config beside the MoVQ. Raises ValueError for what is lacking or not supported."""
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"the config has {name}, which no published Lumina-mGPT 2.0 has and is not supported")
    decoder = DecoderShape.from_config(config)
    text: dict[str, Any] = {
        **{name: config.get(name, default) for name, default in _DEFAULTS.items()},
        "vocab_size": decoder.vocab_size,
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": decoder.num_kv_heads,
        "max_position_embeddings": decoder.max_positions,
        "rope_parameters": _rope(config),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
    }
    if "quantization_config" in config:
        text["quantization_config"] = config["quantization_config"]
    own = config.get("sjd") or {}
    shape = LuminaShape(
        text=text,
        num_norm_groups=config.get("model_parallel_size") or 1,
        image_token_start=own.get("image_token_start", _IMAGE_TOKEN_START),
        target_size=own.get("target_size", _TARGET_SIZE),
        movq=MoVQShape.beside(path),
    )
    end = shape.image_token_start + shape.movq.num_codes
    if end > decoder.vocab_size:
        raise ValueError(f"the codes of pictures have ids up to {end - 1}; the vocabulary ends at {decoder.vocab_size}")
    for name in ("num_attention_heads", "num_key_value_heads"):
        if text[name] % shape.num_norm_groups:
            raise ValueError(f"{name} must be a multiple of model_parallel_size; got {text[name]}")
    return shape


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling, "rope_type": kind}


def decoder_shapes(text: Mapping[str, Any], num_norm_groups: int) -> dict[str, Shape]:
    """Name and shape of every tensor of the language model: a Llama's and, in each layer, two norms by head."""
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    out = llama_shapes(text)
    for index in range(text["num_hidden_layers"]):
        for part in ("q_norm", "k_norm"):
            for name in ("weight", "bias"):
                out[f"model.layers.{index}.self_attn.{part}.{name}"] = (num_norm_groups, head_dim)
    return out


def served_config(path: Path, config: dict[str, Any]) -> Any:
    """The LlamaConfig that vLLM is given, with `num_norm_groups`."""
    from transformers import LlamaConfig

    shape = lumina_shape(path, config)
    return LlamaConfig(
        **shape.text, num_norm_groups=shape.num_norm_groups, architectures=[ARCHITECTURE], name_or_path=str(path)
    )


def picture_sizes(target_size: int, patch: int) -> list[tuple[int, int]]:
    """Widths and heights of about `target_size` squared pixels, in multiples of `patch`, no side four times the other.

    Source: lumina_mgpt/data/item_processor.py, `generate_crop_size_list`, in its order.
    """
    area = (target_size // patch) ** 2
    out = []
    columns, rows = area, 1
    while columns:
        if max(columns, rows) <= 4 * min(columns, rows):
            out.append((columns * patch, rows * patch))
        if (rows + 1) * columns <= area:
            rows += 1
        else:
            columns -= 1
    return out
