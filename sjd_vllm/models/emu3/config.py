"""The figures of an Emu3 checkpoint, from the config of either published layout, and the config that vLLM is given.

Layouts: BAAI's own release (model_type "Emu3") and the Hugging Face conversion (model_type "emu3"). What the configs
leave out are the defaults of the release's configuration_emu3.py, which Transformers' Emu3TextConfig has too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURE = "SJDEmu3ForImageGeneration"
CONFIG_FORMAT = "sjd_emu3"
TOKENIZER_FOLDER = "vision_tokenizer"  # where a folder in the original layout has BAAI/Emu3-VisionTokenizer
DEFAULT_IMAGE_AREA = 720 * 720

_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
# Emu3VisionVQConfig's names (configuration_emu3visionvq.py) of what Transformers calls otherwise
_VQ_NAMES = {
    "latent_channels": "z_channels",
    "double_latent": "double_z",
    "base_channels": "ch",
    "channel_multiplier": "ch_mult",
}
_VQ_FIELDS = (
    *("codebook_size", "embed_dim", "latent_channels", "double_latent", "in_channels", "out_channels"),
    *("temporal_downsample_factor", "base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions"),
)


@dataclass(frozen=True)
class Emu3Shape:
    """What the tensors, the grammar and the sizes of a checkpoint follow from.

    Attributes:
        is_original: BAAI's own release, not the Hugging Face conversion.
        text: the language model, as arguments of Transformers' LlamaConfig.
        vq: the vision tokenizer, as arguments of Transformers' Emu3VQVAEConfig.
        code_ids: token id of each code of the codebook.
        end_of_line: closes a row of codes.
        end_of_picture: end of frame, end of image and end of text, in this order.
        image_area: pixels of a picture, whatever its ratio.
    """

    is_original: bool
    text: dict[str, Any] = field(repr=False)
    vq: dict[str, Any] = field(repr=False)
    code_ids: Sequence[int] = field(repr=False)
    end_of_line: int
    end_of_picture: tuple[int, int, int]
    image_area: int

    @property
    def pixels_per_code(self) -> int:
        """Of a side: the encoder halves its map at every level but the last."""
        return int(2 ** (len(self.vq["channel_multiplier"]) - 1))


def is_emu3(config: dict[str, Any]) -> bool:
    """Whether a config.json is of Emu3; Emu3-Stage1 and Emu3-Chat share it with Emu3-Gen."""
    return config.get("model_type") == "Emu3" or (config.get("model_type") == "emu3" and "vocabulary_map" in config)


def emu3_shape(path: Path, config: dict[str, Any]) -> Emu3Shape:
    """From config.json. Raises ValueError for what it lacks, or what no Emu3 has."""
    try:
        shape = _original_shape(path, config) if config.get("model_type") == "Emu3" else _converted_shape(config)
    except KeyError as error:
        raise ValueError(f"the config of an Emu3 checkpoint lacks {error.args[0]}") from error
    except Exception as error:  # Transformers' configs raise types of their own for a field of the wrong type
        raise ValueError(f"the config of an Emu3 checkpoint cannot be understood: {error}") from error
    codes, vocab = shape.code_ids, shape.text["vocab_size"]
    if len(codes) != shape.vq["codebook_size"] or max(codes) >= vocab:
        raise ValueError(
            f"the config of an Emu3 checkpoint has {len(codes)} ids of codes up to {max(codes, default=-1)}; "
            f"the codebook has {shape.vq['codebook_size']} codes and the vocabulary {vocab} ids"
        )
    return shape


def _original_shape(path: Path, config: dict[str, Any]) -> Emu3Shape:
    from transformers import Emu3VQVAEConfig

    rope = config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta", 1e6), **rope, "rope_type": rope.get("type", "default")}
    text = _text_fields({**config, "rope_parameters": rope}, config)
    file = path / TOKENIZER_FOLDER / "config.json"
    given = json.loads(file.read_text()) if file.is_file() else {}
    defaults = Emu3VQVAEConfig()
    vq = {name: given.get(_VQ_NAMES.get(name, name), getattr(defaults, name)) for name in _VQ_FIELDS}
    vq["hidden_size"] = vq["base_channels"] * vq["channel_multiplier"][-1]
    # emu3_vision_tokens.txt has the codes last, right behind the three tokens that frame a picture
    first = config.get("eoi_token_id", 151853) + 1
    if not given:  # the other download is missing, which `problems` says
        vq["codebook_size"] = max(0, text["vocab_size"] - first)
    return Emu3Shape(
        is_original=True,
        text=text,
        vq=vq,
        code_ids=range(first, text["vocab_size"]),
        end_of_line=config.get("eol_token_id", 151846),
        end_of_picture=(config.get("eof_token_id", 151847), first - 1, text["eos_token_id"]),
        image_area=config.get("image_area", DEFAULT_IMAGE_AREA),
    )


def _converted_shape(config: dict[str, Any]) -> Emu3Shape:
    from transformers import Emu3VQVAEConfig

    ids = config["vocabulary_map"]
    text = _text_fields(config.get("text_config") or {}, config)
    vq = Emu3VQVAEConfig(**(config.get("vq_config") or {}))
    return Emu3Shape(
        is_original=False,
        text=text,
        vq={name: getattr(vq, name) for name in (*_VQ_FIELDS, "hidden_size")},
        code_ids=[ids[f"<|visual token {code:06d}|>"] for code in range(vq.codebook_size)],
        end_of_line=ids["<|extra_200|>"],
        end_of_picture=(ids["<|extra_201|>"], ids["<|image end|>"], text["eos_token_id"]),
        image_area=config.get("image_area", DEFAULT_IMAGE_AREA),
    )


def _text_fields(text: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    from transformers import Emu3TextConfig

    known = {name: text[name] for name in (*_TEXT_FIELDS, "rope_scaling", "rope_theta") if name in text}
    if "rope_parameters" in known:
        known.pop("rope_scaling", None)
        known.pop("rope_theta", None)
    full = Emu3TextConfig(**known)
    out = {name: getattr(full, name) for name in _TEXT_FIELDS}
    out["dtype"] = next((one[key] for one in (text, config) for key in ("dtype", "torch_dtype") if one.get(key)), None)
    if "quantization_config" in config:
        out["quantization_config"] = config["quantization_config"]
    return out


def served_config(path: Path, config: dict[str, Any]) -> Any:
    """The LlamaConfig that vLLM is given."""
    from transformers import LlamaConfig

    return LlamaConfig(**emu3_shape(path, config).text, architectures=[ARCHITECTURE], name_or_path=str(path))
