"""Tiny random Janus checkpoints in both published layouts, with the same weights, written from Transformers' model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration

HEAD_DIM = 32
BOS, EOS, PAD = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5c\u2581pad\u2581\uff5c>",
)
SPECIALS = (BOS, EOS, PAD, "<begin_of_image>", "<end_of_image>", "<image_placeholder>")
PRO_ROLES = ("<|User|>", "<|Assistant|>")
WORDS = ("a", "red", "blue", "house", "lake", "at", "night", ":", "User", "Assistant")
TEXT_VOCAB = 96  # more rows than the tokenizer has ids, as in the published checkpoints
VQ_16 = {"base_channels": 128, "num_embeddings": 16384, "channel_multiplier": [1, 1, 2, 2, 4]}
SMALL_VQ = {"base_channels": 32, "num_embeddings": 48, "channel_multiplier": [1, 2], "latent_channels": 32}


def make_model(*, vq: dict[str, Any], image_size: int, is_tied: bool = False, seed: int = 0) -> Any:
    """A random float32 JanusForConditionalGeneration whose next token depends strongly on the prefix."""
    hidden = 2 * HEAD_DIM
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": TEXT_VOCAB,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": is_tied,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": image_size,
            "patch_size": 2 ** (len(vq["channel_multiplier"]) - 1),
            "projection_dim": hidden,
        },
        vq_config={
            "embed_dim": 8,
            "projection_dim": hidden,
            "image_token_embed_dim": hidden,
            "initializer_range": 0.2,
            **vq,
        },
        tie_word_embeddings=is_tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(config).float().eval()
        with torch.no_grad():
            for name in ("generation_embeddings", "generation_aligner", "generation_head"):
                for parameter in getattr(model.model, name).parameters():
                    parameter.normal_(std=0.3)
    return model


def write_tokenizer(path: Path, *, is_pro: bool = True) -> None:
    """tokenizer.json and tokenizer_config.json with the names that the published tokenizers have."""
    specials = [*SPECIALS, *(PRO_ROLES if is_pro else ())]
    ids = {token: index for index, token in enumerate([*specials, *WORDS, "<unk>"])}
    tokenizer: Any = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    content = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": {"content": BOS, "__type": "AddedToken"},
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "model_max_length": 16384,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(content, ensure_ascii=False))


def write_converted(path: Path, model: Any) -> Path:
    """The layout of deepseek-community/Janus-Pro-7B: Transformers' names, safetensors."""
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def write_original(path: Path, model: Any, *, is_pro: bool = True) -> Path:
    """The layout of deepseek-ai/Janus-Pro-7B: pytorch_model.bin, a config of parts. The model's VQ must be VQ-16."""
    write_tokenizer(path, is_pro=is_pro)
    torch.save(original_tensors(model), path / "pytorch_model.bin")
    text = model.config.text_config
    width = text.hidden_size
    aligner = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    config = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {**aligner, "input_dim": 1024},
        },
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {**aligner, "input_dim": 8},
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": width, "image_token_size": 16384, "n_embed": width},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": 16384, "n_embed": 8},
        },
        "language_config": {
            "hidden_size": width,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "model_type": "llama",
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "torch_dtype": "bfloat16",
            "vocab_size": text.vocab_size,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {"image_size": model.config.vision_config.image_size, "model_name": "siglip_large_patch16_384"},
        },
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def original_tensors(model: Any) -> dict[str, Tensor]:
    """Transformers' names back to DeepSeek's; the parts that understand pictures keep their first tensors only."""
    out: dict[str, Tensor] = {
        "vision_model.vision_tower.pos_embed": torch.zeros(1, 16, 32),
        "aligner.layers.0.weight": torch.zeros(4, 4),
        "gen_vision_model.quantize.codebook_used": torch.zeros(65536),
    }
    for name, tensor in model.state_dict().items():
        if name.startswith(("model.vision_model.", "model.aligner.")):
            continue
        out[_original_name(name)] = tensor.clone()
    return out


def _original_name(name: str) -> str:
    name = name.removeprefix("model.")
    for pattern, replacement in (
        (r"^language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^generation_embeddings\.", "gen_embed."),
        (r"^generation_aligner\.fc1\.", "gen_aligner.layers.0."),
        (r"^generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
        (r"^generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
        (r"^generation_head\.", "gen_head."),
        (r"^vqmodel\.", "gen_vision_model."),
        (r"coder\.(?:down|up)\.(\d+)\.", r"coder.conv_blocks.\1."),
        (r"(conv_blocks\.\d+)\.block\.", r"\1.res."),
        (r"mid\.block_1\.", "mid.0."),
        (r"mid\.attn_1\.", "mid.1."),
        (r"mid\.block_2\.", "mid.2."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


class Reference:
    """Transformers' parts put together as its `generate` does, on the ids that the engine sees; logits [L, V]."""

    def __init__(self, model: Any, begin_of_image: int) -> None:
        self.model = model
        self._begin_of_image = begin_of_image

    @torch.inference_mode()
    def __call__(self, token_ids: list[int]) -> Tensor:
        model, ids = self.model, torch.tensor([token_ids])
        is_code = ids >= TEXT_VOCAB
        text = model.model.language_model.embed_tokens(ids.where(~is_code, 0))
        codes = model.prepare_embeddings_for_image_generation((ids - TEXT_VOCAB).where(is_code, 0))
        hidden = model.model.language_model(inputs_embeds=codes.where(is_code[..., None], text)).last_hidden_state[0]
        text_logits, code_logits = model.lm_head(hidden), model.model.generation_head(hidden)
        scores_codes = (is_code | (ids == self._begin_of_image))[0, :, None]
        return torch.cat(
            [text_logits.where(~scores_codes, -torch.inf), code_logits.where(scores_codes, -torch.inf)], dim=1
        )
