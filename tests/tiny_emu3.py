"""Tiny random Emu3 checkpoints in the published layouts, all with the same weights and the same token ids."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import torch
from reference_movq import ReferenceMoVQ
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import Emu3Config, Emu3ForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

NUM_CODES = 32
IMAGE_AREA = 32 * 32
_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
_VISION = [
    *("<|image token|>", "<|image start|>", "<|image end|>"),
    *(f"<|visual token {code:06d}|>" for code in range(NUM_CODES)),
]
_IDS = {token: 256 + index for index, token in enumerate([*_SPECIALS, *_VISION])}
_VOCAB = 256 + len(_IDS)
_TEXT = {
    "vocab_size": _VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": _IDS["<|extra_203|>"],
    "eos_token_id": _IDS["<|extra_204|>"],
    "pad_token_id": _IDS["<|endoftext|>"],
}
# Emu3VisionVQConfig's names
_VQ = {"codebook_size": NUM_CODES, "embed_dim": 4, "z_channels": 4, "ch": 32, "ch_mult": [1, 1, 2, 2]}
_VQ |= {"num_res_blocks": 1, "attn_resolutions": [3], "temporal_downsample_factor": 4, "model_type": "Emu3VisionVQ"}

# convert_emu3_weights_to_hf.py of Transformers, KEYS_TO_MODIFY_MAPPING
_CONVERSION = (
    (r"\.q\.", ".q_proj."),
    (r"\.k\.", ".k_proj."),
    (r"\.v\.", ".v_proj."),
    (r"\.proj_out\.", ".out_proj."),
    (r"mid\.attn_1\.norm\.", "mid.attn_norm."),
    (r"attn\.(\d)\.norm\.", r"attn_norms.\1."),
    (r"\.down\.", ".down_block.down."),
    (r"\.up\.", ".up_block.up."),
    (r"\.mid\.", ".middle_block."),
)


def reference_vq() -> ReferenceMoVQ:
    """The autoencoder of every checkpoint here."""
    model = ReferenceMoVQ(
        num_codes=NUM_CODES, code_dim=4, z=4, ch=32, ch_mult=[1, 1, 2, 2], num_res_blocks=1, attn=[3], time=2
    )
    return model.randomise(seed=1)


def make_converted(path: Path) -> Path:
    """The Hugging Face conversion, with the names of its first release (text_model.model.*, vqmodel.*)."""
    path.mkdir(parents=True)
    model = _model()
    to_first = {
        "lm_head.": "text_model.lm_head.",
        "model.text_model.": "text_model.model.",
        "model.vqmodel.": "vqmodel.",
    }
    save_file(_renamed(model.state_dict(), to_first), path / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["Emu3ForConditionalGeneration"]
    config["image_area"] = IMAGE_AREA
    _write(path / "config.json", config)
    _converted_tokenizer().save(str(path / "tokenizer.json"))
    return path


def make_original(path: Path) -> Path:
    """BAAI's release, with BAAI/Emu3-VisionTokenizer in its subfolder."""
    (path / "vision_tokenizer").mkdir(parents=True)
    weights = _model().state_dict()
    text = {name: tensor for name, tensor in weights.items() if ".vqmodel." not in name}
    save_file(_renamed(text, {"model.text_model.": "model."}), path / "model.safetensors", metadata={"format": "pt"})
    vq = {name: tensor.clone() for name, tensor in reference_vq().state_dict().items()}
    save_file(vq, path / "vision_tokenizer" / "model.safetensors", metadata={"format": "pt"})
    _write(path / "vision_tokenizer" / "config.json", _VQ)
    names = {"img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>"}
    names |= {"eol": "<|extra_200|>", "eof": "<|extra_201|>"}
    remote = {"AutoConfig": "configuration_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"}
    config = {
        **_TEXT,
        **{f"{name}_token_id": _IDS[token] for name, token in names.items()},
        "model_type": "Emu3",
        "architectures": ["Emu3ForCausalLM"],
        "auto_map": remote,
        "image_area": IMAGE_AREA,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    _write(path / "config.json", config)
    ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (path / "emu3.tiktoken").write_text("".join(ranks))
    (path / "emu3_vision_tokens.txt").write_text("\n".join(_VISION))
    return path


def _model() -> Emu3ForConditionalGeneration:
    vq_names = {"z_channels": "latent_channels", "ch": "base_channels", "ch_mult": "channel_multiplier"}
    vq: dict[str, Any] = {vq_names.get(name, name): value for name, value in _VQ.items() if name != "model_type"}
    config = Emu3Config(
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default"}, "initializer_range": 0.2},
        vq_config={**vq, "hidden_size": 64},
        vocabulary_map={"<image>" if token == "<|extra_0|>" else token: index for token, index in _IDS.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Emu3ForConditionalGeneration(config).float().eval()
        for parameter in model.model.text_model.parameters():
            if parameter.ndim > 1:  # far from tiny, or the next token would hardly depend on the prefix
                torch.nn.init.normal_(parameter, std=0.2)
        torch.nn.init.normal_(model.lm_head.weight, std=0.4)
    weights = {}
    for name, tensor in reference_vq().state_dict().items():
        is_projection = re.search(r"\.(q|k|v|proj_out)\.weight$", name) and tensor.ndim == 4
        for pattern, new in _CONVERSION:
            name = re.sub(pattern, new, name)
        weights[name] = tensor.squeeze() if is_projection else tensor
    model.model.vqmodel.load_state_dict(weights)
    return model


def _renamed(weights: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in weights.items():
        for old, new in prefixes.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        out[name] = tensor.detach().clone().contiguous()
    return out


def _converted_tokenizer() -> Tokenizer:
    bytes_as_text = bytes_to_unicode()
    tokenizer = Tokenizer(BPE({bytes_as_text[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<image>" if token == "<|extra_0|>" else token for token in _IDS]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return tokenizer


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2))
