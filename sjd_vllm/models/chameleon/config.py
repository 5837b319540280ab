"""The config of a Chameleon checkpoint, from either published layout.

Layouts: Meta's release (``models/7b/params.json``, ``consolidate_params.json`` and ``consolidated*.pth``, with
``tokenizer/text_tokenizer.json``, ``vqgan.yaml`` and ``vqgan.ckpt`` beside them; GAIR/Anole-7b-v0.1 has it too) and the
Hugging Face conversion (``config.json`` with model_type "chameleon"; leloy/Anole-7b-v0.1-hf, facebook/chameleon-7b,
Alpha-VLLM/Lumina-mGPT-7B-768). The first has no config that vLLM knows, so it is given the one that the conversion has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import ChameleonConfig

ARCHITECTURE = "ChameleonForConditionalGeneration"
CONFIG_FORMAT = "sjd_chameleon"
# Where Meta's tokenizer files may stand: Meta's layout, that of Alpha-VLLM/Chameleon_7B_mGPT, the folder itself.
TOKENIZER_FOLDERS = ("tokenizer", "original_tokenizers", ".")


def original_folder(path: Path) -> Path | None:
    """The folder of the weights in Meta's layout, or None. Raises ValueError where there are several."""
    found = sorted(file.parent for file in path.glob("models/*/params.json"))
    if len(found) > 1:
        names = ", ".join(str(folder.relative_to(path)) for folder in found)
        raise ValueError(f"{path} holds several models: {names}; leave one of them there.")
    return found[0] if found else None


def is_chameleon(path: Path, config: dict[str, Any]) -> bool:
    """Whether a folder holds a Chameleon, in either layout."""
    if config.get("model_type") == "chameleon":
        return True
    is_original = any(path.glob("models/*/consolidate*")) and _file(path, "text_tokenizer.json") is not None
    return "model_type" not in config and is_original


def read_config(path: Path, config: dict[str, Any]) -> ChameleonConfig:
    """Transformers' config. Raises ValueError for fields that are missing, of a wrong type or not supported.

    For Meta's layout its attribute `original_weights` is the folder of the weights, else it has none.
    """
    from transformers import ChameleonConfig

    folder = None if config.get("model_type") == "chameleon" else original_folder(path)
    fields = _original_fields(path, folder) if folder else config
    try:
        read = ChameleonConfig(**{key: value for key, value in fields.items() if key not in ("model_type", "sjd")})
    except Exception as error:  # Transformers' own validation errors are no ValueErrors
        raise ValueError(f"the config of this Chameleon checkpoint cannot be used: {error}") from error
    _check(read)
    if folder:
        read.original_weights = str(folder)
    return read


def served_config(path: Path, config: dict[str, Any]) -> ChameleonConfig:
    """The config that vLLM is given for Meta's layout."""
    read = read_config(path, config)
    read.architectures = [ARCHITECTURE]
    read.name_or_path = str(path)
    return read


def vocabulary(path: Path, config: ChameleonConfig) -> dict[str, int]:
    """Token -> id: the config's `vocabulary_map`, or what the tokenizer's file has. Raises ValueError without both."""
    if config.vocabulary_map:
        return dict(config.vocabulary_map)
    file = tokenizer_file(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        return {**content["model"]["vocab"], **added}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def tokenizer_file(path: Path) -> Path:
    """tokenizer.json of the conversion, or Meta's text_tokenizer.json. Raises ValueError where there is neither."""
    converted = path / "tokenizer.json"
    file = converted if converted.is_file() else _file(path, "text_tokenizer.json")
    if file is None:
        raise ValueError(f"{path} has no tokenizer: neither tokenizer.json nor tokenizer/text_tokenizer.json is there")
    return file


def vqgan_file(path: Path, suffix: str) -> Path | None:
    """Meta's vqgan.ckpt or vqgan.yaml, if one is there."""
    return _file(path, f"vqgan{suffix}")


def _file(path: Path, name: str) -> Path | None:
    candidates = (path / folder / name for folder in TOKENIZER_FOLDERS)
    return next((file for file in candidates if file.is_file()), None)


def _original_fields(path: Path, folder: Path) -> dict[str, Any]:
    """As Transformers' convert_chameleon_weights_to_hf.py makes the config of a conversion."""
    params: dict[str, Any] = _json(folder / "params.json")
    params = {**params, **params.get("model", {})}
    if (folder / "consolidate_params.json").is_file():  # chameleon/inference/loader.py: it has the last word
        params |= _json(folder / "consolidate_params.json")
    try:
        dim, heads = params["dim"], params["n_heads"]
        multiple_of = params.get("multiple_of", 256)
        # chameleon/inference/transformer.py, FeedForward, of hidden_dim = 4 * dim
        hidden = int((params.get("ffn_dim_multiplier") or 1) * int(2 * 4 * dim / 3))
        return {
            "vocab_size": params.get("vocab_size") or len(_json(tokenizer_file(path))["model"]["vocab"]),
            "hidden_size": dim,
            "intermediate_size": multiple_of * -(-hidden // multiple_of),
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads") or heads,
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": params.get("rope_theta", 10000.0),
            # Meta's `Options.max_seq_len`; the converter knows longer ones by their larger base
            "max_position_embeddings": 16384 if params.get("rope_theta", 10000.0) > 10000.0 else 4096,
            "model_parallel_size": params.get("model_parallel_size", 1),
            "swin_norm": params.get("swin_norm", False),
            "dtype": "bfloat16",
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'params.json'} lacks or garbles a field: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no object")
    return content


def _check(config: ChameleonConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    ranks = config.model_parallel_size or 1
    if config.hidden_size % heads or heads % kv_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size}, {heads} attention heads and {kv_heads} key-value heads do not divide"
        )
    if heads % ranks or kv_heads % ranks:
        raise ValueError(f"model_parallel_size {ranks} divides neither {heads} heads nor {kv_heads} key-value heads")
    if config.tie_word_embeddings or config.attention_bias or config.mlp_bias:
        raise ValueError("Chameleon has neither tied embeddings nor biases in its layers; the config asks for them")
