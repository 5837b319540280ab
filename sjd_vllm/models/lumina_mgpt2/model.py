"""The decoder of Lumina-mGPT 2.0 for vLLM: Chameleon's, a Llama whose queries and keys are normalised head by head.

vLLM 0.32 has no Chameleon. Source of the architecture: Alpha-VLLM/Lumina-mGPT-2.0,
lumina_mgpt/model/chameleon/modeling_chameleon.py (`ChameleonAttention`, `ChameleonLayerNorm`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from sjd_vllm.models.llama_weights import load_checked
from sjd_vllm.models.lumina_mgpt2.config import decoder_shapes

_UNUSED = ("model.vqmodel.",)  # Chameleon's own autoencoder, which the authors' class has and no code of theirs uses


class HeadNorm(nn.Module):
    """LayerNorm of each head, with weights that groups of neighbouring heads share in the checkpoint.

    A rank holds the weights of its own heads, one row each. Where there are fewer heads than ranks, ranks share a head
    as QKVParallelLinear has it.
    """

    def __init__(self, num_groups: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.num_groups, self.num_heads, self.head_dim = num_groups, num_heads, head_dim
        self.num_local_heads = max(1, num_heads // ranks)
        self.first_head = rank * num_heads // ranks
        self.weight = nn.Parameter(torch.ones(self.num_local_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(self.num_local_heads, head_dim))
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": self._load})

    def _load(self, parameter: nn.Parameter, published: Tensor) -> None:
        by_head = published.repeat_interleave(self.num_heads // self.num_groups, dim=0)
        parameter.data.copy_(by_head[self.first_head : self.first_head + self.num_local_heads])

    def forward(self, heads: Tensor) -> Tensor:
        """[N, local heads * head_dim] -> the same."""
        split = heads.view(-1, self.num_local_heads, self.head_dim)
        normed = F.layer_norm(split, (self.head_dim,), eps=1e-5)
        return (normed * self.weight + self.bias).view(heads.shape)


class NormedAttention(LlamaAttention):
    """Llama's attention with `q_norm` and `k_norm` between the projections and the rotation."""

    def __init__(self, config: Any, hidden_size: int, num_heads: int, num_kv_heads: int, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, num_heads, num_kv_heads, **kwargs)
        self.q_norm = HeadNorm(config.num_norm_groups, num_heads, self.head_dim)
        self.k_norm = HeadNorm(config.num_norm_groups, num_kv_heads, self.head_dim)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, self.q_norm(query), self.k_norm(key))
        out, _ = self.o_proj(self.attn(query, key, value))
        return out


class NormedDecoderLayer(LlamaDecoderLayer):
    """Llama's layer around `NormedAttention`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=NormedAttention)


class LuminaMGPT2ForImageGeneration(LlamaForCausalLM):
    """The served model; its config is made by `sjd_vllm.models.lumina_mgpt2.config.served_config`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=NormedDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError that names each tensor that is missing, misshapen or not known."""
        if self.model.quant_config is not None:  # a quantised checkpoint has tensors of other names and shapes
            kept = ((name, tensor) for name, tensor in weights if not name.startswith(_UNUSED))
            quantised: set[str] = super().load_weights(kept)
            return quantised
        shapes = decoder_shapes(self.config.to_dict(), self.config.num_norm_groups)
        return load_checked(super().load_weights, weights, shapes, unused=_UNUSED)
