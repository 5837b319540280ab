"""The decoder of Lumina-mGPT 2.0 for vLLM: Chameleon's layers, under a vocabulary of its own.

Source: Alpha-VLLM/Lumina-mGPT-2.0, lumina_mgpt/model/chameleon/modeling_chameleon.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.chameleon.model import ChameleonDecoderLayer
from sjd_vllm.models.llama_weights import load_checked
from sjd_vllm.models.lumina_mgpt2.config import decoder_shapes

_UNUSED = ("model.vqmodel.",)  # Chameleon's own autoencoder, which the authors' class has and no code of theirs uses


class LuminaMGPT2ForImageGeneration(LlamaForCausalLM):  # type: ignore[misc]
    """The served model; its config is made by `sjd_vllm.models.lumina_mgpt2.config.served_config`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=ChameleonDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError that names each tensor that is missing, misshapen or not known."""
        config = self.config.to_dict()
        shapes = decoder_shapes(config, self.config.num_norm_groups)
        return load_checked(self, super().load_weights, weights, shapes, rule_of(config), unused=_UNUSED)
