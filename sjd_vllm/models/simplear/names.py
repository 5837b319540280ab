"""Names and shapes of the tensors of SimpleAR's language model, which are Transformers' for a Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sjd_vllm.models.llama_weights import llama_shapes
from sjd_vllm.models.tensors import Shape


def language_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """A Llama's, with biases on queries, keys and values."""
    shapes = llama_shapes(config)
    biases: dict[str, Shape] = {
        name.removesuffix("weight") + "bias": shape[:1]
        for name, shape in shapes.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    return {**shapes, **biases}


def unused_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A second name of the embedding, which training code saves even where the two are one."""
    return ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
