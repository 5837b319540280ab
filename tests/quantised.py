"""Turns a checkpoint into one of eight-bit weights and inputs, as llm-compressor writes it, and a model likewise.

The format is compressed-tensors' "int-quantized": weights by output channel with their scales in the file, inputs by
token as they come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Linear layers of a decoder by their published names; not output heads, which recipes leave alone
_LINEAR = re.compile(
    r"(q|k|v|o|gate|up|down)_proj$|generation_aligner\.(fc1|hidden_layers\.\d+)$|generation_head\.proj_out$"
)
_OTHER_PARTS = ("vqmodel.", "vision_model.", "model.vqmodel.", "model.vision_model.")
# Half of llm-compressor's range: on a CPU without VNNI instructions oneDNN, and so vLLM, adds the products of two
# neighbouring weights in 16 bits and cuts off what does not fit; 2 * 255 * 63 does.
_LARGEST = 63
_ARGS = {"num_bits": 8, "type": "int", "symmetric": True}


def quantise(path: Path, kept: Iterable[str], heads: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantise the checkpoint in a folder, in place.

    Args:
        kept: published names of linear layers to leave as they are.
        heads: of what else the recipe says to leave alone.

    Returns:
        Published name of each quantised layer -> int8 weight [N, K], float32 scale [N, 1].
    """
    kept, out = set(kept), {}
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(".weight")]:
            layer = name.removesuffix(".weight")
            if _LINEAR.search(layer) and not layer.startswith(_OTHER_PARTS) and layer not in kept:
                out[layer] = tensors[name], tensors[f"{layer}.weight_scale"] = _by_channel(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_ARGS, "strategy": "channel", "dynamic": False},
                "input_activations": {**_ARGS, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": [*kept, *heads],
    }
    (path / "config.json").write_text(json.dumps(config))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        index.unlink()  # of the files before; it is not needed
    return out


def quantise_model(model: nn.Module, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Give a float model those weights, and inputs rounded as the checkpoint asks for. Keys are the model's names."""
    for name, (packed, scale) in weights.items():
        layer: Any = model.get_submodule(name)
        layer.weight.data.copy_(packed * scale)
        layer.register_forward_pre_hook(_round_inputs)


def _by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / _LARGEST
    return (weight / scale).round().to(torch.int8), scale


def _round_inputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = (inputs[0].abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-12)
    return ((inputs[0] / scale).round().clamp(-128, 127) * scale, *inputs[1:])
