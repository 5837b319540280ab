"""Quantised checkpoints of every family: they are served as such, stay exact, and every tensor is accounted for."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_chameleon
import tiny_janus
import tiny_lumina_mgpt2
import torch
from engine_harness import Engine, engine
from every_family import MAKERS
from family_harness import FullLogits, engine_prompt, picture_params, recorded_windows
from quantised import quantise, quantise_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Emu3ForConditionalGeneration, LlamaForCausalLM, Qwen2ForCausalLM
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from sjd_vllm.images.check_command import checkpoint_report
from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.emu3.names import VQ_PREFIXES, own_name, published_text
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.janus import names as janus_names
from sjd_vllm.models.janus.model import JanusForImageGeneration
from sjd_vllm.models.llama_weights import llama_shapes, load_checked
from sjd_vllm.models.registry import load_family
from sjd_vllm.models.tensors import PackedShape, read_tensors

PROMPT = "a red house"
# Of logits, relative to the largest of their row, against a model that rounds weights and inputs to the same numbers.
# Mostly they differ by float32's rounding, 1e-5 (TYPICAL). Now and then an input lies so near to the middle between two
# integers that the two round it differently: up to 0.015 were seen (LARGEST). Where one layer has one scale in place of
# each channel's, it is 0.07 or more, and typically 0.03; without rounding of the inputs 0.075 and 0.04.
TYPICAL, LARGEST = 1e-3, 0.04


def _own_logits(model: Any) -> FullLogits:
    @torch.inference_mode()
    def logits(token_ids: list[int]) -> Tensor:
        return model(torch.tensor([token_ids])).logits[0]

    return logits


def _unmasked_logits(model: Any) -> FullLogits:
    return tiny_chameleon.reference_of(model)


@dataclass(frozen=True)
class Case:
    """A family's quantised checkpoint.

    Attributes:
        reference: a float model of the checkpoint in a folder, not quantised yet.
        logits_of: of such a model.
        kept: layers that the recipe leaves alone: published names -> names in vLLM.
        heads: what else it leaves alone.
        of_model: published name of a layer -> the reference's.
    """

    reference: Callable[[Path], Any]
    logits_of: Callable[[Any], FullLogits]
    kept: dict[str, str]
    heads: tuple[str, ...] = ("lm_head",)
    of_model: Callable[[str], str] = str


DOWN = "model.layers.1.mlp.down_proj"


def _janus(path: Path) -> Any:
    return tiny_janus.make_model(vq=tiny_janus.SMALL_VQ, image_size=12)


CASES = {
    "demo": Case(LlamaForCausalLM.from_pretrained, _own_logits, {DOWN: DOWN}),
    "chameleon": Case(lambda path: tiny_chameleon.make_model(), _unmasked_logits, {DOWN: DOWN}),
    "lumina_mgpt": Case(lambda path: tiny_chameleon.make_model(), _unmasked_logits, {DOWN: DOWN}),
    "lumina_mgpt2": Case(lambda path: tiny_lumina_mgpt2.reference_model(), _unmasked_logits, {DOWN: DOWN}),
    "emu3": Case(
        Emu3ForConditionalGeneration.from_pretrained,
        _own_logits,
        {"text_model.model.layers.1.mlp.down_proj": DOWN},
        ("text_model.lm_head",),
        lambda name: name.replace("text_model.model.", "model.text_model."),
    ),
    "janus": Case(
        _janus,
        lambda model: tiny_janus.Reference(model, begin_of_image=3),
        {"model.language_model.layers.1.mlp.down_proj": DOWN, "model.generation_head.proj_out": "gen_head.proj"},
        ("lm_head", "model.generation_head.vision_head"),
    ),
    "simplear": Case(Qwen2ForCausalLM.from_pretrained, _own_logits, {DOWN: DOWN}, ()),
}


@dataclass(frozen=True)
class Made:
    """A checkpoint on disk.

    Attributes:
        reference: a float model that rounds as the checkpoint asks for.
        weights: published name of each quantised layer -> int8 weight, scales.
        bytes_before: of its weights, as they were.
    """

    name: str
    path: Path
    case: Case
    reference: Any
    weights: dict[str, tuple[Tensor, Tensor]]
    bytes_before: int

    @property
    def family(self) -> ImageFamily:
        found = load_family(self.path)
        assert found is not None
        assert found.name == self.name
        return found

    def layer(self, end: str) -> str:
        """The first quantised layer whose name ends so."""
        return next(name for name in sorted(self.weights) if name.endswith(end))


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, case = request.param, CASES[request.param]
    path = MAKERS[name](tmp_path_factory.mktemp("quantised") / name)
    family = load_family(path)
    assert family is not None
    bytes_before = checkpoint_report(family)["weight_bytes"]
    reference = case.reference(path).float().eval()
    weights = quantise(path, case.kept, case.heads)
    quantise_model(reference, {case.of_model(layer): parts for layer, parts in weights.items()})
    return Made(name, path, case, reference, weights, bytes_before)


def test_it_is_served_quantised_and_stays_exact(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    family = made.family
    size = family.sizes[0]
    prompt = engine_prompt(family, size, PROMPT)
    with engine(made.path, window=8, max_num_seqs=16) as running:
        check_layers(running, made)
        params = picture_params(family, size, PROMPT, temperature=1, seed=3)
        with recorded_windows(running, monkeypatch) as seen:
            running.generate([prompt], [params])
        greedy = [
            picture_params(family, size, PROMPT, temperature=0, num_speculative_tokens=window) for window in (0, 8)
        ]
        plain, drafted = running.generate([prompt, prompt], greedy)
        running.assert_nothing_left()
    assert drafted == plain
    assert max(num_drafts for _, num_drafts, _ in seen) >= 4
    rows = seen[:: max(1, len(seen) // 40)]
    columns = family.grammar(size).token_ids
    worst = differences_of(made.case.logits_of(made.reference), rows, columns)
    assert max(worst) < LARGEST
    assert statistics.median(worst) < TYPICAL
    for end in ("1.self_attn.q_proj", "1.mlp.gate_proj"):  # those of which the logits depend least
        layer = made.layer(end)
        wrong = copy.deepcopy(made.reference)
        packed, scale = made.weights[layer]
        wrong.get_submodule(made.case.of_model(layer)).weight.data.copy_(packed * scale.mean())
        worst = differences_of(made.case.logits_of(wrong), rows, columns)
        assert max(worst) > LARGEST, layer
        assert statistics.median(worst) > TYPICAL, layer


def check_layers(running: Engine, made: Made) -> None:
    """All linear layers take int8, but for those that the recipe leaves alone under their published names."""
    model = running.runner.model
    kept = set(made.case.kept.values())
    num_quantised = 0
    for name, layer in model.named_modules():
        if isinstance(layer, ParallelLMHead) or name in kept:
            assert not isinstance(layer.quant_method, CompressedTensorsLinearMethod), name
        if isinstance(layer, LinearBase) and name in kept:
            assert isinstance(layer.quant_method, UnquantizedLinearMethod), name
            kept.remove(name)
        elif isinstance(layer, LinearBase):
            assert isinstance(layer.quant_method, CompressedTensorsLinearMethod), name
            assert isinstance(layer.scheme.kernel, CPUInt8ScaledMMLinearKernel), name
            num_quantised += 1 if "qkv" not in name and "gate_up" not in name else 3 if "qkv" in name else 2
    assert not kept
    assert num_quantised == len(made.weights)


def differences_of(
    reference: FullLogits, rows: Iterable[tuple[list[int], int, Tensor]], columns: Tensor
) -> list[float]:
    """Of each row of windows, the largest difference of its logits, relative to the largest of them."""
    out = []
    for tokens, num_drafts, logits in rows:
        expected = reference(tokens)[-num_drafts - 1 :, columns]
        scale = expected.abs().amax(dim=1, keepdim=True).clamp_min(1)
        out.append(float(((logits[:, columns].float() - expected).abs() / scale).max()))
    return out


def test_check_accepts_it_and_tells_what_it_takes(made: Made) -> None:
    report = checkpoint_report(made.family)
    assert report["problems"] == []
    # a byte for each weight in place of four, and four bytes for each channel's scale; files have headers, too
    saved = sum(3 * packed.numel() - 4 * scale.numel() for packed, scale in made.weights.values())
    assert abs(made.bytes_before - report["weight_bytes"] - saved) < 8192
    assert saved > 65536


def edited(made: Made, tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> list[str]:
    """What `check` finds once the tensors of each file were edited."""
    path = tmp_path / made.path.name
    shutil.copytree(made.path, path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    family = load_family(path)
    assert family is not None
    return family.problems()


def test_a_missing_layer_is_named(made: Made, tmp_path: Path) -> None:
    layer = made.layer("0.self_attn.o_proj")

    def drop(tensors: dict[str, Tensor]) -> None:
        for part in ("weight", "weight_scale"):
            tensors.pop(f"{layer}.{part}", None)

    assert edited(made, tmp_path, drop) == [f"the tensor {layer}.weight is missing"]


@pytest.mark.parametrize("end", ["0.self_attn.k_proj", "1.mlp.up_proj"])
def test_a_missing_scale_beside_others_is_named(made: Made, tmp_path: Path, end: str) -> None:
    name = f"{made.layer(end)}.weight_scale"
    problems = edited(made, tmp_path, lambda tensors: tensors.pop(name, None))
    assert problems[0] == f"the tensor {name} is missing"


def test_a_missing_scale_of_a_layer_by_itself_is_named(made: Made, tmp_path: Path) -> None:
    layer = made.layer("1.self_attn.o_proj")
    assert edited(made, tmp_path, lambda tensors: tensors.pop(f"{layer}.weight_scale", None)) == [
        f"the scales of {layer} are missing ({layer}.weight_scale in most formats)"
    ]


def test_a_surplus_tensor_is_named(made: Made, tmp_path: Path) -> None:
    layer = made.layer("1.mlp.up_proj")
    known = f"{layer}.weight_scale"
    surplus = [known.replace(".layers.1.", ".layers.7."), known.replace("up_proj", "side_proj"), f"{layer}.bias"]

    def add(tensors: dict[str, Tensor]) -> None:
        if known in tensors:
            tensors.update({name: tensors[known].clone() for name in surplus})

    assert sorted(edited(made, tmp_path, add)) == sorted(f"the tensor {name} is not known" for name in surplus)


def test_a_config_without_quantisation_knows_no_scales(made: Made, tmp_path: Path) -> None:
    """So it stays when vLLM is to quantise while it loads (`--quantization`)."""
    path = tmp_path / made.path.name
    shutil.copytree(made.path, path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    family = load_family(path)
    assert family is not None
    assert set(family.problems()) == {f"the tensor {layer}.weight_scale is not known" for layer in made.weights}


@pytest.fixture(scope="module")
def emu3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = MAKERS["emu3"](tmp_path_factory.mktemp("loaded") / "emu3")
    quantise(path, CASES["emu3"].kept, CASES["emu3"].heads)
    return path


def test_loading_translates_names_and_names_what_is_wrong(emu3: Path) -> None:
    family: Any = load_family(emu3)
    text = family._shape.text
    tensors = dict(read_tensors(emu3.glob("*.safetensors")))

    def load() -> set[str]:
        return load_checked(
            nn.Module(),
            lambda weights: {name for name, _ in weights},
            tensors.items(),
            llama_shapes(text),
            rule_of(text),
            own_name=own_name,
            published=published_text,
            unused=VQ_PREFIXES,
        )

    loaded = load()
    assert {"lm_head.weight", f"{DOWN}.weight", "model.layers.0.mlp.down_proj.weight_scale"} <= loaded
    assert all(name.startswith(("model.", "lm_head.")) for name in loaded)
    name = "text_model.model.layers.0.mlp.down_proj.weight_scale"
    tensors["text_model.model.scale"] = tensors.pop(name)
    with pytest.raises(
        ValueError, match=r"text_model\.model\.scale is not known; the scales of text_model.*down_proj are"
    ):
        load()


def test_a_layer_that_the_config_alone_calls_quantised_is_named() -> None:
    """As vLLM's merged layers are called; it takes float weights for packed ones, and leaves the scales as they lie."""
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.weight, model.mlp.weight_scale = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 1))
    model.attn = nn.Module()
    model.attn.prob_scale = nn.Parameter(torch.ones(1))  # of the key-value cache; it has a default
    rule = rule_of({"quantization_config": {"quant_method": "compressed-tensors"}})
    said = ["the tensor mlp.weight_scale is missing: the config says that this layer is quantised"]
    assert rule.unfilled(model, {"mlp.weight"}) == said
    assert rule.unfilled(model, {"mlp.weight", "mlp.weight_scale"}) == []
    assert rule_of({}).unfilled(model, set()) == []


def test_names_of_janus_in_both_layouts_are_the_models(tmp_path: Path) -> None:
    family: Any = load_family(MAKERS["janus"](tmp_path / "janus"))
    for is_original in (False, True):
        shape = replace(family._shape, is_original=is_original)
        for own, tensor in janus_names.language_tensors(shape).items():
            assert janus_names.own_name(tensor.name) == own
            layer, scale = tensor.name.rpartition(".")[0], own.rpartition(".")[0] + ".weight_scale"
            assert janus_names.own_name(f"{layer}.weight_scale") == scale
            assert JanusForImageGeneration.hf_to_vllm_mapper.map_name(layer) == own.rpartition(".")[0]


def test_formats_that_replace_the_weight_and_scales_of_the_cache() -> None:
    expected = {
        **{f"a.self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"},
        "a.self_attn.q_norm.weight": (2, 4),
        "a.norm.weight": (8,),
    }
    rule = rule_of({"quantization_config": {"quant_method": "gptq"}})
    found: dict[str, Any] = {"a.self_attn.q_norm.weight": (2, 4), "a.norm.weight": (8,), "a.self_attn.k_scale": (1,)}
    for part in "qkvo":
        layer = f"a.self_attn.{part}_proj"
        found |= {
            f"{layer}.qweight": PackedShape((1, 8)),
            f"{layer}.qzeros": PackedShape((1, 1)),
            f"{layer}.scales": (1, 8),
        }
    found["a.self_attn.v_proj.output_scale"] = (1,)
    assert rule.differences(expected, found) == []
    assert all(rule.is_wanted(expected, name, shape) for name, shape in found.items())
    assert not rule.is_wanted(expected, "a.self_attn.o_proj.weight", (8, 4)), "of full numbers in another shape"
    wrong = {"a.self_attn.q_norm.weight_scale": (2, 1), "a.norm.scales": (8,), "b.self_attn.k_scale": (1,)}
    assert rule.differences(expected, {**found, **wrong}) == [f"the tensor {name} is not known" for name in wrong]
    assert not any(rule.is_wanted(expected, name, shape) for name, shape in wrong.items())
