"""Emu3 for vLLM: its language model is a Llama; the vision tokenizer is not loaded here (`vq`)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM

from sjd_vllm.models.emu3.names import VQ_PREFIXES, own_name, published_text
from sjd_vllm.models.llama_weights import llama_shapes, load_checked


class Emu3ForImageGeneration(LlamaForCausalLM):  # type: ignore[misc]
    """vLLM's Llama with the published names; its config is made by `sjd_vllm.models.emu3.config.served_config`."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Any published layout. Raises ValueError that names each tensor that is missing, misshapen or not known."""
        if self.model.quant_config is not None:  # a quantised checkpoint has tensors of other names and shapes
            kept = ((own_name(name), tensor) for name, tensor in weights if not name.startswith(VQ_PREFIXES))
            quantised: set[str] = super().load_weights(kept)
            return quantised
        return load_checked(
            super().load_weights,
            weights,
            llama_shapes(self.config.to_dict()),
            own_name=own_name,
            published=published_text,
            unused=VQ_PREFIXES,
        )
