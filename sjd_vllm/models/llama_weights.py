"""Names and shapes of the tensors of a Llama, and loading them into vLLM's with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sjd_vllm.models.accounting import ExactRule
from sjd_vllm.models.tensors import Shape, stored_shape


def llama_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name and shape of every tensor of a Llama without biases, from the fields of its Transformers config."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * head_dim, hidden),
        "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    out: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        out.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = (vocab, hidden)
    return out


def load_checked(
    model: nn.Module,
    load: Callable[[Iterable[tuple[str, Tensor]]], set[str]],
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    rule: ExactRule,
    *,
    own_name: Callable[[str], str] = str,
    published: Callable[[Mapping[str, Shape], Iterable[str]], Mapping[str, Shape]] = lambda shapes, _: shapes,
    unused: tuple[str, ...] = (),
) -> set[str]:
    """Load weights into a model of vLLM; returns the names of the parameters that were filled.

    vLLM's loader alone does not notice a missing part of a merged parameter (q, k, v; gate, up).

    Args:
        model: to load into.
        load: loads tensors under the names that the model has.
        weights: published name and content.
        shapes: the model's own names (unmerged) and shapes of all that it needs, not quantised.
        rule: of the checkpoint, by its config (`rule_of`).
        own_name: published name -> the model's, also of what a quantised layer has beside its weight.
        published: `shapes` by published names, given the names found.
        unused: names, or beginnings of names that end with a dot, that may be there and are not loaded here.

    Raises ValueError that names each tensor that is missing, misshapen or not known.
    """
    found: dict[str, Shape] = {}

    def fitting() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            found[name] = stored_shape(tensor)
            if rule.is_wanted(shapes, own_name(name), found[name]):
                yield own_name(name), tensor

    loaded = load(fitting())
    problems = rule.differences(published(shapes, found), found, surplus=unused) or rule.unfilled(model, loaded)
    if problems:
        raise ValueError("the weights do not fit the config: " + "; ".join(problems))
    return loaded
