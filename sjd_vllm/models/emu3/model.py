"""Emu3 for vLLM: its language model is a Llama; the vision tokenizer is not loaded here (`vq`)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.emu3.names import OWN_PREFIXES, VQ_PREFIXES, own_name, published_text
from sjd_vllm.models.llama_weights import llama_shapes, load_checked


class Emu3ForImageGeneration(LlamaForCausalLM):  # type: ignore[misc]
    """vLLM's Llama with the published names; its config is made by `sjd_vllm.models.emu3.config.served_config`."""

    # vLLM translates the names of layers in a quantisation config by it, such as those to leave alone
    hf_to_vllm_mapper = LlamaForCausalLM.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={prefix.removesuffix("."): own.removesuffix(".") for prefix, own in OWN_PREFIXES.items()}
    )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Any published layout. Raises ValueError that names each tensor that is missing, misshapen or not known."""
        config = self.config.to_dict()
        return load_checked(
            self,
            super().load_weights,
            weights,
            llama_shapes(config),
            rule_of(config),
            own_name=own_name,
            published=published_text,
            unused=VQ_PREFIXES,
        )
