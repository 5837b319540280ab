"""Which tensors a checkpoint must have: those of the model, or what quantisation puts in their place.

A quantised checkpoint says so by `quantization_config` in its config. Formats differ in what they store
(`weight_packed`, `qweight`, `weight_scale`, `scales`, `g_idx`, ...), but in all of them what belongs to a linear layer
X is called X.something. So the layers' names are held against the config there, and a layer's tensors against its
neighbours'.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from sjd_vllm.models.tensors import PackedShape, Shape, differences

# What vLLM merges must be quantised alike; of a merged layer it does not notice that a part is missing.
_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Scales of keys and values in the cache: beside the projections, or below those that make them.
_OF_CACHE = re.compile(r"\.[qkv]+_(scale|zero_point)$")
_BELOW_SOME = re.compile(r"output_|[qkv]_(scale|zero_point)$")
_SCALES = re.compile(r"(?!input_|output_|[qkv]_scale).*(scale|absmax|scb)", re.IGNORECASE)


class ExactRule:
    """The tensors are those that the config tells of, in its shapes."""

    def is_wanted(self, expected: Mapping[str, Shape], name: str, shape: Shape) -> bool:
        """Whether a tensor found is one to load."""
        return expected.get(name) == shape

    def differences(
        self, expected: Mapping[str, Shape], found: Mapping[str, Shape], *, surplus: Iterable[str] = ()
    ) -> list[str]:
        """What is wrong with the tensors found, one line each; `surplus` as in `tensors.differences`."""
        return differences(expected, found, surplus=surplus)

    def unfilled(self, model: nn.Module, loaded: Container[str]) -> list[str]:
        """What a loaded model of vLLM still lacks beyond that, one line each.

        Args:
            loaded: names of the parameters that were filled.
        """
        return []


class QuantisedRule(ExactRule):
    """A linear layer may have further tensors, and packed numbers for its weight; all else is as the config tells.

    A layer without any tensor is missing, a tensor of no layer is surplus. What is packed has scales.
    """

    def is_wanted(self, expected: Mapping[str, Shape], name: str, shape: Shape) -> bool:
        if super().is_wanted(expected, name, shape) or _is_of_cache(expected, name):
            return True
        layer = _layer(expected, name)
        return layer is not None and (name != f"{layer}.weight" or isinstance(shape, PackedShape))

    def differences(
        self, expected: Mapping[str, Shape], found: Mapping[str, Shape], *, surplus: Iterable[str] = ()
    ) -> list[str]:
        layers = _parts(expected, found)
        plain = {
            name: shape
            for name, shape in found.items()
            if _layer(expected, name) is None and not _is_of_cache(expected, name)
        }
        for layer, parts in layers.items():
            weight, full = parts.get("weight"), expected[f"{layer}.weight"]
            plain[f"{layer}.weight"] = full if weight is None or isinstance(weight, PackedShape) else weight
        return [
            *super().differences(expected, plain, surplus=surplus),
            *(f"the tensor {name} is missing" for name in _missing_beside_others(layers)),
            *(
                f"the scales of {layer} are missing ({layer}.weight_scale in most formats)"
                for layer, parts in layers.items()
                if any(isinstance(shape, PackedShape) for shape in parts.values())
                and not any(map(_SCALES.match, parts))
            ),
        ]

    def unfilled(self, model: nn.Module, loaded: Container[str]) -> list[str]:
        """Scales of layers that the config says are quantised, and the files do not; vLLM would go on without."""
        return [
            f"the tensor {layer}.{part} is missing: the config says that this layer is quantised"
            for layer, module in model.named_modules()
            for part in _scales_of(module)
            if f"{layer}.{part}" not in loaded
        ]


def rule_of(config: Mapping[str, Any]) -> ExactRule:
    """For a checkpoint, by its config. One that vLLM quantises as it loads (`--quantization`) is not quantised."""
    return QuantisedRule() if config.get("quantization_config") else ExactRule()


def _layer(expected: Mapping[str, Shape], name: str) -> str | None:
    """The linear layer, or embedding, that a tensor is of; None for one of none, and for biases, which stay."""
    ends = (match.start() for match in re.finditer(r"\.", name))
    for layer in (name[:end] for end in ends):
        # query-key norms have a row for each head, so they have two dimensions, too
        if len(expected.get(f"{layer}.weight", ())) == 2 and not layer.endswith("norm"):
            return None if name == f"{layer}.bias" else layer
    return None


def _scales_of(module: nn.Module) -> list[str]:
    """Parameters of a layer of vLLM that a quantised checkpoint must fill."""
    if getattr(getattr(module, "quant_method", None), "uses_meta_device", False):  # quantised while loading
        return []
    parts = {name for name, parameter in module.named_parameters(recurse=False) if parameter.numel()}
    has_weight = any(part.startswith(("weight", "qweight")) for part in parts)  # attention has scales alone
    return [part for part in sorted(parts) if has_weight and _SCALES.match(part)]


def _is_of_cache(expected: Mapping[str, Shape], name: str) -> bool:
    attention, count = _OF_CACHE.subn("", name)
    return bool(count) and f"{attention}.k_proj.weight" in expected


def _parts(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Layer -> what follows its name in those of its tensors -> shape."""
    out: dict[str, dict[str, Shape]] = {}
    for name, shape in found.items():
        layer = _layer(expected, name)
        if layer is not None:
            out.setdefault(layer, {})[name.removeprefix(f"{layer}.")] = shape
    return out


def _missing_beside_others(layers: Mapping[str, Mapping[str, Shape]]) -> Iterator[str]:
    """Names of tensors that a part of a merged layer lacks and another part of it has."""
    for layer in layers:
        block, _, own = layer.rpartition(".")
        for group in _MERGED:
            if own == group[0] or (own in group and f"{block}.{group[0]}" not in layers):
                present = [f"{block}.{one}" for one in group if f"{block}.{one}" in layers]
                union = dict.fromkeys(part for one in present for part in layers[one] if not _BELOW_SOME.match(part))
                yield from (f"{one}.{part}" for one in present for part in union if part not in layers[one])
