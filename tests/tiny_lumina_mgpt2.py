"""A tiny random Lumina-mGPT 2.0 checkpoint in the published layout, and the same weights in Transformers' Chameleon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from reference_movq import ReferenceMoVQ
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

NUM_CODES = 32
NUM_NORM_GROUPS = 2
TARGET_SIZE = 64
# The order of the published tokenizer: <racm3:break> 151665, <eoss> 151666, ..., <reserved08799> 151670, and counts
SPECIALS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<racm3:break>", "<eoss>", "<reserved08706>"),
    *(f"<reserved{index:05d}>" for index in range(8796, 8805)),
]
IDS = {token: 256 + index for index, token in enumerate(SPECIALS)}
IMAGE_TOKEN_START = 256 + len(SPECIALS)
_TEXT: dict[str, Any] = {
    "vocab_size": IMAGE_TOKEN_START + NUM_CODES,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "model_parallel_size": NUM_NORM_GROUPS,
    "swin_norm": False,
}
_MOVQ = {
    "ddconfig": {
        "double_z": False,
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "dropout": 0.0,
    },
    "n_embed": NUM_CODES,
    "embed_dim": 4,
}


def reference_vq() -> ReferenceMoVQ:
    """The autoencoder of the checkpoint."""
    model = ReferenceMoVQ(num_codes=NUM_CODES, code_dim=4, z=4, ch=32, ch_mult=[1, 1, 2, 2], num_res_blocks=1, attn=[3])
    return model.randomise(seed=2)


def reference_model() -> ChameleonForConditionalGeneration:
    """Transformers' Chameleon, whose norms have weights of their own for each head; here equal within groups."""
    vq = {"embed_dim": 4, "num_embeddings": 8, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1]}
    config = ChameleonConfig(
        **_TEXT, vq_config={**vq, "num_res_blocks": 1, "resolution": 32}, vocabulary_map={"<image>": 0}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChameleonForConditionalGeneration(config).float().eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vqmodel" not in name and "_norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        torch.nn.init.normal_(model.lm_head.weight, std=0.4)
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                heads, head_dim = norm.weight.shape
                for parameter, mean in ((norm.weight, 1.0), (norm.bias, 0.0)):
                    by_group = torch.normal(mean, 0.3, (NUM_NORM_GROUPS, head_dim))
                    parameter.data.copy_(by_group.repeat_interleave(heads // NUM_NORM_GROUPS, dim=0))
    return model


def make_lumina_mgpt2(path: Path) -> Path:
    """config.json, safetensors and the tokenizer in the folder, and the MoVQ where the authors put it.

    What the authors' code writes down as numbers (first id of a code, size of a picture) is smaller here, which the
    config says under "sjd"; the MoVQ's sizes stand beside it.
    """
    path.mkdir(parents=True)
    weights = {}
    for name, tensor in reference_model().state_dict().items():
        if "q_norm" in name or "k_norm" in name:
            tensor = tensor[:: len(tensor) // NUM_NORM_GROUPS]
        weights[name] = tensor.detach().clone().contiguous()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        **_TEXT,
        "model_type": "chameleon",
        "architectures": ["ChameleonXLLMXForConditionalGeneration"],
        "hidden_act": "silu",
        "mask_image_logits": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "sjd": {"family": "lumina_mgpt2", "image_token_start": IMAGE_TOKEN_START, "target_size": TARGET_SIZE},
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    movq = path / "movqgan" / "270M"
    movq.mkdir(parents=True)
    torch.save(reference_vq().state_dict(), movq / "movqgan_270M.ckpt")
    (movq / "config.json").write_text(json.dumps(_MOVQ, indent=2))
    _tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|im_end|>"}))
    return path


def _tokenizer() -> Tokenizer:
    bytes_as_text = bytes_to_unicode()
    tokenizer = Tokenizer(BPE({bytes_as_text[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS])
    return tokenizer
