"""Tiny random Chameleon, Anole and Lumina-mGPT checkpoints in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from sjd_vllm.models.chameleon.vq import ChameleonVQ, VQShape

HEAD_DIM = 32
NUM_CODES = 24
RESOLUTION = 12
WORDS = ("a", "red", "blue", "house", "lake", "at", "night", "Generate", "an", "image", "of", "according", "to", "the")
WORDS += ("following", "prompt", ":", "8x8", "12x4", "16x4", "4x16")
DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 8,
    "resolution": RESOLUTION,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def letters(code: int) -> str:
    """The name of an image token."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def vocabulary() -> dict[str, int]:
    """Names as in text_tokenizer.json; the codes are out of order, so that their names alone tell them."""
    order = torch.randperm(NUM_CODES, generator=torch.Generator().manual_seed(5)).tolist()
    sizes = [f"<reserved{8800 + units:05d}>" for units in range(1, 6)]
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    behind = ["<eoss>", "<racm3:break>", "<reserved08706>", "<image>", "<reserved08799>", *sizes]
    names = [*specials, *(letters(code) for code in order), *behind, *WORDS]
    return {name: index for index, name in enumerate(names)}


VOCAB_SIZE = -(-len(vocabulary()) // 8) * 8


def write_tokenizer(file: Path) -> None:
    """tokenizer.json or text_tokenizer.json."""
    tokenizer: Any = Tokenizer(WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))


def vq_weights(attn_resolutions: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """A random autoencoder under the names of vqgan.ckpt; a test holds them against Transformers' encoder."""
    shape = VQShape(NUM_CODES, 6, 8, 32, (1, 2), 1, RESOLUTION, attn_resolutions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        weights = ChameleonVQ(shape).state_dict()
        for name, tensor in weights.items():
            if "norm" in name:
                tensor.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
        weights["quant_conv.weight"].mul_(5)  # so that a picture's latents come near to many entries
    return weights


def write_vqgan(folder: Path, attn_resolutions: tuple[int, ...] = ()) -> dict[str, Any]:
    """Meta's vqgan.ckpt and vqgan.yaml; returns the params of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {**vq_weights(attn_resolutions), "loss.discriminator.main.0.weight": torch.zeros(2, 2)}
    torch.save({"epoch": 3, "global_step": 100, "state_dict": weights}, folder / "vqgan.ckpt")
    params = {
        "embed_dim": 6,
        "n_embed": NUM_CODES,
        "ddconfig": {**DDCONFIG, "attn_resolutions": list(attn_resolutions)},
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
        "ckpt_path": "vqgan.ckpt",
    }
    content = {"model": {"base_learning_rate": 4.5e-06, "target": "taming.models.vqgan.VQModel", "params": params}}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(content))
    return params


def config_fields(*, heads: int, kv_heads: int, swin_norm: bool, ranks: int) -> dict[str, Any]:
    """config.json as Transformers 4.43 wrote it."""
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": heads * HEAD_DIM,
        "initializer_range": 0.2,
        "intermediate_size": 192,
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "model_parallel_size": ranks,
        "model_type": "chameleon",
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "swin_norm": swin_norm,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
        "vocabulary_map": vocabulary(),
        "vq_config": {
            "attn_resolutions": None,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "double_latent": False,
            "embed_dim": 6,
            "latent_channels": 8,
            "model_type": "chameleon_vqgan",
            "num_embeddings": NUM_CODES,
            "num_res_blocks": 1,
            "out_channels": 3,
            "resolution": RESOLUTION,
        },
    }


def make_model(*, heads: int = 2, kv_heads: int = 2, swin_norm: bool = False, ranks: int = 1, seed: int = 0) -> Any:
    """A random float32 ChameleonForConditionalGeneration whose next token depends strongly on the prefix."""
    fields = config_fields(heads=heads, kv_heads=kv_heads, swin_norm=swin_norm, ranks=ranks)
    fields.pop("architectures")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ChameleonForConditionalGeneration(ChameleonConfig(**fields)).float().eval()
        with torch.no_grad():
            for layer in model.model.layers:
                for norm, count in ((layer.self_attn.q_norm, heads), (layer.self_attn.k_norm, kv_heads)):
                    for parameter, mean in ((norm.weight, 1.0), (norm.bias, 0.0)):
                        rows = mean + 0.5 * torch.randn(ranks, HEAD_DIM)
                        parameter.copy_(rows.repeat_interleave(count // ranks, 0))
            encoder = {name: tensor for name, tensor in vq_weights().items() if not name.startswith("decoder.")}
            model.model.vqmodel.load_state_dict(encoder)
    return model


def reference_of(model: Any) -> Any:
    """Logits [L, V] of Transformers' model, without its mask over image tokens."""

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> Tensor:
        hidden = model.model(torch.tensor([token_ids])).last_hidden_state
        return model.lm_head(hidden)[0]

    return logits


def write_anole(path: Path, model: Any) -> Path:
    """The layout of leloy/Anole-7b-v0.1-hf: Transformers' names, the pixel decoder among them, two files."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors |= {f"model.vqmodel.{name}": tensor for name, tensor in vq_weights().items() if name.startswith("decoder.")}
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path / "tokenizer.json")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name].contiguous() for name in part}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_config(path, model, {})
    return path


def write_lumina(path: Path, model: Any, *, vqgan_folder: str = "original_tokenizers") -> Path:
    """The layout of Alpha-VLLM/Lumina-mGPT-7B-768: no pixels, a row per rank in the norms; Meta's files beside it."""
    config = model.config
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vqmodel."):
            continue
        rows = len(tensor) // config.model_parallel_size
        tensors[name] = tensor[::rows].contiguous() if "q_norm" in name or "k_norm" in name else tensor.clone()
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path / "tokenizer.json")
    changes = {
        "architectures": ["ChameleonXLLMXForConditionalGeneration"],
        "dropout": 0.05,
        "mask_image_logits": False,
        "z_loss_weight": 1e-05,
    }
    _write_config(path, model, changes)
    write_vqgan(path / vqgan_folder)
    return path


def write_original(path: Path, *, heads: int = 2, kv_heads: int = 2, swin_norm: bool = False, ranks: int = 1) -> Path:
    """Meta's layout, as GAIR/Anole-7b-v0.1 has it; one file of weights for each rank."""
    folder, dim, hidden = path / "models" / "7b", heads * HEAD_DIM, 192
    folder.mkdir(parents=True)
    whole = {"tok_embeddings.weight": (VOCAB_SIZE, dim // ranks), "output.weight": (VOCAB_SIZE // ranks, dim)}
    for layer in range(2):
        prefix = f"layers.{layer}."
        whole |= {
            f"{prefix}attention.wq.weight": (dim // ranks, dim),
            f"{prefix}attention.wk.weight": (kv_heads * HEAD_DIM // ranks, dim),
            f"{prefix}attention.wv.weight": (kv_heads * HEAD_DIM // ranks, dim),
            f"{prefix}attention.wo.weight": (dim, dim // ranks),
            f"{prefix}feed_forward.w1.weight": (hidden // ranks, dim),
            f"{prefix}feed_forward.w2.weight": (dim, hidden // ranks),
            f"{prefix}feed_forward.w3.weight": (hidden // ranks, dim),
        }
    generator = torch.Generator().manual_seed(7)

    def norms(size: int, names: list[str], parts: tuple[str, ...]) -> dict[str, Tensor]:
        means = {"weight": 1.0, "bias": 0.0}
        return {f"{n}.{p}": means[p] + 0.3 * torch.randn(size, generator=generator) for n in names for p in parts}

    shared = norms(
        dim, ["norm", *(f"layers.{i}.{n}_norm" for i in range(2) for n in ("attention", "ffn"))], ("weight",)
    )
    of_heads = [f"layers.{i}.attention.{n}_normalization" for i in range(2) for n in "qk"]
    for rank in range(ranks):
        tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in whole.items()}
        tensors |= shared | norms(HEAD_DIM, of_heads, ("weight", "bias")) | {"rope.freqs": torch.zeros(HEAD_DIM // 2)}
        torch.save(tensors, folder / ("consolidated.pth" if ranks == 1 else f"consolidated.{rank:02}.pth"))
    model = {
        "dim": dim,
        "n_layers": 2,
        "n_heads": heads,
        "n_kv_heads": kv_heads if kv_heads != heads else None,
        "vocab_size": VOCAB_SIZE,
        "multiple_of": 64,
        "ffn_dim_multiplier": None if heads == 2 else hidden / int(8 * dim / 3),
        "norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "qk_normalization": True,
        "swin_norm": swin_norm,
    }
    (folder / "params.json").write_text(json.dumps({"model_parallel_size": 8, "model": model}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": ranks}))
    write_tokenizer(path / "tokenizer" / "text_tokenizer.json")
    write_vqgan(path / "tokenizer")
    return path


def _write_config(path: Path, model: Any, changes: dict[str, Any]) -> None:
    own = model.config
    fields = config_fields(
        heads=own.num_attention_heads,
        kv_heads=own.num_key_value_heads,
        swin_norm=own.swin_norm,
        ranks=own.model_parallel_size,
    )
    (path / "config.json").write_text(json.dumps({**fields, **changes}, indent=2))
