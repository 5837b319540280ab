"""The figures of a Janus checkpoint, from the config of either published layout, and the config that vLLM is given.

Layouts: DeepSeek's own release (model_type "multi_modality") and the Hugging Face conversion (model_type "janus").

A picture's codes have ids of their own, from 0, which text has too. Here code c has the virtual id
`text_vocab_size` + c, so the vocabulary that the engine sees is the text's and the codebook's, one after the other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.config_format import register_config_format
from sjd_vllm.models.tensors import tensor_shapes

ARCHITECTURE = "SJDJanusForImageGeneration"
BEGIN_OF_IMAGE = "<begin_of_image>"  # VLChatProcessor's image_start_tag; janus/models/processing_vlm.py

# The authors' class VQ-16, which takes nothing from the config (modeling_vlm.py: `gen_vision_cls()`); vq_model.py.
_VQ_16 = {
    "embed_dim": 8,
    "num_embeddings": 16384,
    "latent_channels": 256,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
}


@dataclass(frozen=True)
class JanusShape:
    """What the names and shapes of a checkpoint's tensors follow from.

    Attributes:
        is_original: DeepSeek's own release, not the Hugging Face conversion.
        text: the language model, as arguments of Transformers' LlamaConfig.
        has_lm_head: whether the text head has weights of its own.
        aligner_depth: linear layers of the MLP behind the embedding of codes.
        head_dim: width inside the generation head.
        vq: the VQ autoencoder, as arguments of Transformers' JanusVQVAEConfig.
        image_size: pixels of a picture's side.
    """

    is_original: bool
    text: dict[str, Any] = field(repr=False)
    has_lm_head: bool
    aligner_depth: int
    head_dim: int
    vq: dict[str, Any] = field(repr=False)
    image_size: int

    @property
    def text_vocab_size(self) -> int:
        return int(self.text["vocab_size"])

    @property
    def hidden_size(self) -> int:
        return int(self.text["hidden_size"])

    @property
    def num_codes(self) -> int:
        return int(self.vq["num_embeddings"])

    @property
    def code_dim(self) -> int:
        return int(self.vq["embed_dim"])

    @property
    def vocab_size(self) -> int:
        """Text ids and, behind them, the virtual ids of codes."""
        return self.text_vocab_size + self.num_codes

    @property
    def grid(self) -> int:
        """Codes of a picture's side: one for as many pixels as the VQ encoder halves its map."""
        halvings = len(self.vq["channel_multiplier"]) - 1
        return self.image_size >> halvings


def is_janus(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a Janus that writes VQ codes; DeepSeek-VL and JanusFlow share its model_type."""
    parts = {"multi_modality": "gen_vision_config", "janus": "vq_config"}
    return parts.get(str(config.get("model_type"))) in config


def janus_shape(path: Path, config: dict[str, Any]) -> JanusShape:
    """From config.json. Raises ValueError for what it lacks, or what no Janus has.

    Of the weights only the headers are read, and only where the config leaves open whether there is a text head.
    """
    try:
        shape = _original_shape(config) if config["model_type"] == "multi_modality" else _converted_shape(path, config)
    except KeyError as error:
        raise ValueError(f"config.json of a Janus checkpoint lacks {error.args[0]}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"config.json of a Janus checkpoint cannot be understood: {error}") from error
    if shape.grid < 1:
        raise ValueError(f"config.json says image_size {shape.image_size}, which is less than one code")
    return shape


def _original_shape(config: dict[str, Any]) -> JanusShape:
    from transformers import LlamaConfig

    if config["gen_vision_config"]["cls"] != "VQ-16":
        raise ValueError(f"gen_vision_config.cls must be 'VQ-16'; got {config['gen_vision_config']['cls']!r}")
    aligner = config["gen_aligner_config"]["params"]
    if aligner["projector_type"] != "mlp_gelu":
        raise ValueError(f"gen_aligner_config.projector_type must be 'mlp_gelu'; got {aligner['projector_type']!r}")
    text = LlamaConfig(**config["language_config"])
    vq = {**_VQ_16, "image_token_embed_dim": text.hidden_size}
    codes = config["gen_vision_config"]["params"]
    for name, key in (("image_token_size", "num_embeddings"), ("n_embed", "embed_dim")):
        if codes[name] != vq[key]:
            raise ValueError(f"gen_vision_config.{name} must be VQ-16's {vq[key]}; got {codes[name]!r}")
    return JanusShape(
        is_original=True,
        text=_text_fields(text, config),
        has_lm_head=not text.tie_word_embeddings,
        aligner_depth=aligner.get("depth", 1),
        head_dim=config["gen_head_config"]["params"]["image_token_embed"],
        vq=vq,
        image_size=config["vision_config"]["params"]["image_size"],
    )


def _converted_shape(path: Path, config: dict[str, Any]) -> JanusShape:
    from transformers import JanusConfig

    janus = JanusConfig(**config)
    # Where a conversion says nothing, Transformers 5 takes the heads for tied, which DeepSeek's are not.
    is_tied = janus.tie_word_embeddings or janus.text_config.tie_word_embeddings
    has_lm_head = not is_tied or any(name.startswith("lm_head.") for name in tensor_shapes(weight_files(path)))
    vq = janus.vq_config
    names = (*_VQ_16, "out_channels", "in_channels", "double_latent", "dropout", "num_patches", "image_token_embed_dim")
    return JanusShape(
        is_original=False,
        text=_text_fields(janus.text_config, config),
        has_lm_head=has_lm_head,
        aligner_depth=vq.num_hidden_layers,
        head_dim=vq.projection_dim,
        vq={name: getattr(vq, name) for name in names},
        image_size=janus.vision_config.image_size,
    )


def _text_fields(text: Any, config: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = text.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    fields["dtype"] = fields.get("dtype") or config.get("dtype") or config.get("torch_dtype")
    if "quantization_config" in config:
        fields["quantization_config"] = config["quantization_config"]
    return fields


def begin_of_image_id(path: Path) -> int:
    """The id of the token that a picture's codes follow. Raises ValueError where tokenizer.json lacks it."""
    ids = token_ids(path)
    if BEGIN_OF_IMAGE not in ids:
        raise ValueError(f"{path / 'tokenizer.json'} has no token {BEGIN_OF_IMAGE!r}")
    return ids[BEGIN_OF_IMAGE]


def token_ids(path: Path) -> dict[str, int]:
    """The ids of the special tokens of tokenizer.json. Raises ValueError where there is none."""
    file = path / "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {token["content"]: token["id"] for token in content["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def served_config(path: Path, config: dict[str, Any]) -> Any:
    """The LlamaConfig that vLLM is given, with the figures of the checkpoint under `janus`."""
    from transformers import LlamaConfig

    shape = janus_shape(path, config)
    return LlamaConfig(
        **{**shape.text, "vocab_size": shape.vocab_size, "tie_word_embeddings": False},
        architectures=[ARCHITECTURE],
        janus=asdict(shape),
        begin_of_image_id=begin_of_image_id(path),
        name_or_path=str(path),
    )


def register() -> str:
    """Tell vLLM and Transformers, in this process, how a config of Janus is read; returns the name of that format."""
    from transformers import AutoConfig, PreTrainedConfig

    class MultiModalityConfig(PreTrainedConfig):  # type: ignore[misc]
        model_type = "multi_modality"

    # vLLM asks Transformers for the config once more where it loads a tokenizer
    AutoConfig.register("multi_modality", MultiModalityConfig, exist_ok=True)
    return register_config_format("sjd_janus", served_config)
