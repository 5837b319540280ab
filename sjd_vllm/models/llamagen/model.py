"""LlamaGen on vLLM: vLLM's Llama with rotary positions over the grid of codes.

What differs from a Llama (FoundationVision/LlamaGen, autoregressive/models/gpt.py):

* The position of a token is its place in the grid: half of the rotary pairs turn with its row, half with its column.
  The tokens of the prompt are multiplied by a cosine and a sine of zero, so their queries and keys vanish. A caption
  may have any number of rows, so where the grid begins differs from request to request: vLLM asks
  `get_mrope_input_positions` once a request, and hands the forward what follows from it, under any chunks, windows and
  preemptions.
* Heads of 100 numbers (3B), which no attention kernel takes: they are continued with zeros, which change nothing.
* Captions come as vectors (`prompt_embeds`), the projected features of T5; only their own rows are in a prompt. The
  authors pad in front to 120 rows; a padded row is seen by itself alone (autoregressive/models/generate.py,
  `generate`), so it reaches no other row, and without rotation no row's place matters either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsQuant
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from sjd_vllm.models.llamagen.layout import UNUSED, LlamaGenShape
from sjd_vllm.models.llamagen.prompts import project_captions
from sjd_vllm.models.tensors import INERT_CLASSES, differences, state_dict


class GridRotary(nn.Module):
    """Rotary embedding by place in the grid, in float32 (`precompute_freqs_cis_2d`, `apply_rotary_emb`).

    Position 0 is all of the prompt, whose vectors become zero; code i of the picture has position i + 1.
    """

    table: Tensor

    def __init__(self, shape: LlamaGenShape) -> None:
        super().__init__()
        self.vector_size = shape.served_head_dim
        pairs = shape.head_dim // 4  # that turn with the row; as many turn with the column
        steps = torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / (2 * pairs)
        angles = torch.outer(torch.arange(shape.grid, dtype=torch.float32), 1.0 / shape.rope_base**steps)
        by_row = angles[:, None, :].expand(-1, shape.grid, -1)
        by_column = angles[None, :, :].expand(shape.grid, -1, -1)
        of_code = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
        # [grid^2 + 1, 2, vector_size / 2]; zeros in front for the prompt, behind for what continues a head
        table = torch.zeros(len(of_code) + 1, 2, self.vector_size // 2, dtype=torch.float32)
        table[1:, :, : 2 * pairs] = torch.stack([of_code.cos(), of_code.sin()], dim=1)
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """positions [N]; query and key [N, heads * vector_size] of any two numbers of heads."""
        cosine, sine = self.table[positions][:, :, None].unbind(1)
        return self._turn(query, cosine, sine), self._turn(key, cosine, sine)

    def _turn(self, vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        even, odd = vectors.float().view(len(vectors), -1, self.vector_size // 2, 2).unbind(-1)
        turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
        return turned.view_as(vectors).to(vectors.dtype)


class LlamaGenAttention(LlamaAttention):  # type: ignore[misc]
    """vLLM's, with the rotary embedding above."""

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        shape = LlamaGenShape(**config.llamagen)
        # Called before the attention itself is made: heads that are continued with zeros keep their own scale.
        self.scaling = shape.head_dim**-0.5
        self.rotary_emb = GridRotary(shape)


class LlamaGenDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """vLLM's, with the attention above."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=LlamaGenAttention)


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {-1: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class LlamaGenModel(LlamaModel):  # type: ignore[misc]
    """The Llama, with places in the grid made of vLLM's positions inside what vLLM compiles.

    A CUDA graph reads its inputs where they lay when it was captured, so nothing may be computed on the way to it.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LlamaGenDecoderLayer)
        self.last_position = LlamaGenShape(**vllm_config.model_config.hf_config.llamagen).grid ** 2

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, dim]; positions [3, N] all say the same.

        A request that runs on past the end of its picture, which no grammar allows, stays at the last position.
        """
        places = positions[0].clamp(0, self.last_position)
        out: Tensor = super().forward(input_ids, places, intermediate_tensors, inputs_embeds)
        return out


class LlamaGenForImageGeneration(nn.Module, SupportsMRoPE, SupportsQuant):  # type: ignore[misc]
    """The served model; its config is made by `sjd_vllm.models.llamagen.layout.served_config`."""

    packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.shape = LlamaGenShape(**config.llamagen)
        # vLLM's loader would take every .pt file of the folder
        self.allow_patterns_overrides = [config.weight_file]
        self.model = LlamaGenModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.shape.num_codes,
            self.shape.dim,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(self.shape.num_codes)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Places of a prompt's tokens, three times [L], and what a later token's is ahead of its index.

        A prompt is a class or caption, and perhaps a picture's first codes.
        """
        is_code = torch.tensor(input_tokens) < self.shape.num_codes
        positions = torch.where(is_code, is_code.cumsum(0), 0)
        return positions.expand(3, -1), 1 + int(is_code.sum()) - len(input_tokens)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[N] -> [N, dim]."""
        out: Tensor = self.model.embed_input_ids(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, dim]; positions [3, N]."""
        if intermediate_tensors is not None:
            raise ValueError("pipeline stages are not supported")
        out: Tensor = self.model(input_ids, positions, None, inputs_embeds)
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[N, dim] -> logits [N, vocabulary], -inf for what is no code; None on ranks that gather none."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is None:
            return None
        return F.pad(logits, (0, self.shape.vocab_size - self.shape.num_codes), value=-torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
        """The release's names. Raises ValueError that names each tensor that is missing, misshapen or not known."""
        with torch.serialization.safe_globals([*INERT_CLASSES]):  # vLLM's loader opens the file when asked for weights
            tensors = state_dict(dict(weights))
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        problems = differences(self.shape.tensors, found, surplus=UNUSED)
        if problems:
            raise ValueError("the weights are not those of this LlamaGen: " + "; ".join(problems))
        loaded: set[str] = AutoWeightsLoader(self).load_weights(self._renamed(tensors))
        return loaded

    def _renamed(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The same under the names of vLLM's Llama, heads continued with zeros, all ids in one table."""
        shape = self.shape
        yield "model.embed_tokens.weight", self._embeddings(tensors)
        yield "model.norm.weight", tensors["norm.weight"]
        yield "lm_head.weight", tensors["output.weight"]
        kv_dim = shape.num_kv_heads * shape.head_dim
        for index in range(shape.num_layers):
            theirs, ours = f"layers.{index}.", f"model.layers.{index}."
            parts = torch.split(tensors[theirs + "attention.wqkv.weight"], [shape.dim, kv_dim, kv_dim])
            for name, part in zip("qkv", parts, strict=True):
                yield f"{ours}self_attn.{name}_proj.weight", self._continued(part)
            yield ours + "self_attn.o_proj.weight", self._continued(tensors[theirs + "attention.wo.weight"].T).T
            yield ours + "mlp.gate_proj.weight", tensors[theirs + "feed_forward.w1.weight"]
            yield ours + "mlp.up_proj.weight", tensors[theirs + "feed_forward.w3.weight"]
            yield ours + "mlp.down_proj.weight", tensors[theirs + "feed_forward.w2.weight"]
            yield ours + "input_layernorm.weight", tensors[theirs + "attention_norm.weight"]
            yield ours + "post_attention_layernorm.weight", tensors[theirs + "ffn_norm.weight"]

    def _embeddings(self, tensors: dict[str, Tensor]) -> Tensor:
        codes = tensors["tok_embeddings.weight"]
        if not self.shape.is_text:
            return torch.cat([codes, tensors["cls_embedding.embedding_table.weight"].to(codes)])
        unconditional = project_captions(tensors["cls_embedding.uncond_embedding"], tensors)
        # the last row is never read: a caption's vectors take its place
        return torch.cat([codes, unconditional.to(codes), torch.zeros_like(codes[:1])])

    def _continued(self, weight: Tensor) -> Tensor:
        """[heads * head_dim, dim] -> [heads * served_head_dim, dim]."""
        by_head = weight.reshape(-1, self.shape.head_dim, weight.shape[1])
        return F.pad(by_head, (0, 0, 0, self.shape.served_head_dim - self.shape.head_dim)).flatten(0, 1)
