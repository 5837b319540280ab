"""What vLLM loads for `method="custom_class"`.

That method gives synchronous scheduling, the V1 runner and no draft model. The drafts themselves are made where
the logits are, in `v1_runner`, because self-drafting needs the target distribution of every slot.
"""

from __future__ import annotations

from typing import Any, NoReturn


class SelfDraftingProposer:
    """Satisfies vLLM's proposer interface; it is never asked to propose."""

    supports_mm_inputs = False

    def __init__(self, vllm_config: Any) -> None:
        del vllm_config

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no draft model to load."""

    def propose(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises RuntimeError: reached only if vLLM runs a runner that is not ours, which would be plain decoding."""
        raise RuntimeError("the sjd model runner is not active, so there is nobody to make drafts")
