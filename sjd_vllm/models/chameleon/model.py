"""Chameleon for vLLM: its Llama with normalised queries and keys, and with norms behind the blocks in the 30B model.

Lumina-mGPT has the same decoder. The pixel decoder is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.chameleon.weights import decoder_problems, decoder_shapes, read_original, with_rows_of_heads
from sjd_vllm.models.tensors import Shape, stored_shape


class HeadNorm(nn.Module):
    """LayerNorm of each head's numbers, scaled and shifted by the head's own row; a rank holds its own heads.

    Args:
        total_heads: over all ranks.
        head_dim: numbers of a head.
    """

    def __init__(self, total_heads: int, head_dim: int) -> None:
        super().__init__()
        world, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.total_heads, self.head_dim = total_heads, head_dim
        self.num_heads = max(1, total_heads // world)
        # with fewer key-value heads than ranks, several ranks hold the same one
        self.first_head = rank * total_heads // world
        self.weight = nn.Parameter(torch.ones(self.num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(self.num_heads, head_dim))
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": self._load})

    def forward(self, states: Tensor) -> Tensor:
        """[N, heads * head_dim] of this rank."""
        heads = states.view(-1, self.num_heads, self.head_dim)
        normed = F.layer_norm(heads, (self.head_dim,), eps=1e-5) * self.weight + self.bias
        return normed.view(states.shape)

    def _load(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        """From a row per head, or a row per rank of the training."""
        rows = loaded.repeat_interleave(self.total_heads // len(loaded), dim=0)
        parameter.data.copy_(rows[self.first_head : self.first_head + self.num_heads])


class ChameleonAttention(LlamaAttention):  # type: ignore[misc]
    """Queries and keys are normalised before they are turned by their positions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_norm = HeadNorm(self.total_num_heads, self.head_dim)
        self.k_norm = HeadNorm(self.total_num_kv_heads, self.head_dim)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.q_norm(query.contiguous()), self.k_norm(key.contiguous())
        query, key = self.rotary_emb(positions, query, key)
        out: Tensor
        out, _ = self.o_proj(self.attn(query, key, value))
        return out


class ChameleonDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Llama's layer with the attention above."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix=prefix, attn_layer_type=ChameleonAttention)


class ChameleonSwinDecoderLayer(ChameleonDecoderLayer):
    """The norms stand behind attention and MLP, as in Swin Transformer V2 (`swin_norm`)."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer's output is the sum of both tensors that it returns, and so is its input."""
        entered = hidden_states if residual is None else hidden_states + residual
        attended = self.self_attn(positions=positions, hidden_states=entered)
        middle = entered + self.input_layernorm(attended)
        return self.post_attention_layernorm(self.mlp(middle)), middle


class ChameleonForImageGeneration(LlamaForCausalLM):  # type: ignore[misc]
    """The decoder of Chameleon, Anole and Lumina-mGPT; no id is masked here, which the grammar does."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        layer_type = ChameleonSwinDecoderLayer if config.swin_norm else ChameleonDecoderLayer
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Either published layout. Raises ValueError that names each tensor that is missing, misshapen or not known."""
        original = getattr(self.config, "original_weights", None)
        if original is not None:
            weights = read_original(self.config, Path(original))
        expected = decoder_shapes(self.config)
        rule = rule_of(self.config.to_dict())
        found: dict[str, Shape] = {}

        def fitting() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                found[name] = stored_shape(tensor)
                if rule.is_wanted(expected, name, with_rows_of_heads(expected, name, found[name])):
                    yield name, tensor

        loaded: set[str] = super().load_weights(fitting())
        problems = decoder_problems(expected, found, rule) or rule.unfilled(self, loaded)
        if problems:
            raise ValueError("the weights are not those of this Chameleon: " + "; ".join(problems))
        return loaded
