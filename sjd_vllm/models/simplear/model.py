"""SimpleAR for vLLM: its own Qwen2, with every tensor of the checkpoint accounted for."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.llama_weights import load_checked
from sjd_vllm.models.simplear.names import language_tensors, unused_names


class SimpARForCausalLM(Qwen2ForCausalLM):  # type: ignore[misc]
    """The class that the published config names."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError that names each tensor that is missing, misshapen or not known."""
        config = self.config.to_dict()
        return load_checked(
            self,
            super().load_weights,
            weights,
            language_tensors(config),
            rule_of(config),
            unused=unused_names(config),
        )
