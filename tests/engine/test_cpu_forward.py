"""A forward on a CPU: normalisation by vLLM's C kernels wherever they can be used, and weights laid out by input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_harness import engine
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import ir
from vllm.config import CompilationConfig, KernelConfig, VllmConfig
from vllm.config.compilation import CompilationMode
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.platforms import current_platform

from sjd_vllm.engine import cpu_forward

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the kernels are those of vLLM's CPU build")
OPS = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)
PRODUCTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Which implementation stands first is the process's own."""
    with OPS[0].set_priority(["native"]), OPS[1].set_priority(["native"]):
        yield


def config(mode: CompilationMode = CompilationMode.NONE, **priority: str) -> VllmConfig:
    kernel_config = KernelConfig(ir_op_priority=priority)  # type: ignore[arg-type]
    return VllmConfig(kernel_config=kernel_config, compilation_config=CompilationConfig(mode=mode))


def inputs(num_rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows * width)
    shapes = ((num_rows, width), (num_rows, width), (width,))
    x, residual, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, residual, weight


@pytest.mark.parametrize("width", [16, 192, 4096])
@pytest.mark.parametrize("num_rows", [1, 3, 130])
def test_the_kernels_give_what_the_operators_give(num_rows: int, width: int) -> None:
    x, residual, weight = inputs(num_rows, width)
    normed = ir.ops.rms_norm(x, weight, 1e-6)
    added = ir.ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    cpu_forward.use_kernels_for_norms(config())
    torch.testing.assert_close(ir.ops.rms_norm(x, weight, 1e-6), normed)
    before = x.clone(), residual.clone()
    torch.testing.assert_close(ir.ops.fused_add_rms_norm(x, residual, weight, 1e-6), added)
    torch.testing.assert_close((x, residual), before, rtol=0, atol=0)
    torch.testing.assert_close(ir.ops.fused_add_rms_norm.maybe_inplace(x, residual, weight, 1e-6), added)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Else a token would depend on the window, or on what is decoded beside it."""
    cpu_forward.use_kernels_for_norms(config())
    x, residual, weight = inputs(37, 192)
    whole = ir.ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    for row in range(37):
        alone = ir.ops.fused_add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, 1e-6)
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, whole, strict=True))


def test_the_kernels_are_used_where_they_can_be() -> None:
    def chosen(x: Tensor, weight: Tensor | None, variance_size: int | None = None) -> str:
        provider: str = ir.ops.rms_norm.dispatch(x, weight, 1e-6, variance_size).provider
        return provider

    cpu_forward.use_kernels_for_norms(config())
    x, residual, weight = inputs(5, 64)
    assert chosen(x, weight) == "sjd_cpu"
    assert ir.ops.fused_add_rms_norm.dispatch(x, residual, weight, 1e-6).provider == "sjd_cpu"
    apart = x[:, ::2]
    assert chosen(apart, weight[:32]) == "native"
    assert chosen(x, None) == "native"
    assert chosen(x, weight, 32) == "native"
    assert chosen(x[:, :24].contiguous(), weight[:24]) == "native"
    assert chosen(x.bfloat16(), weight.bfloat16()) == "native"
    assert chosen(x, weight.bfloat16()) == "native"
    fitting = ir.ops.fused_add_rms_norm.dispatch(x, residual.t().contiguous().t(), weight, 1e-6)
    assert fitting.provider == "native"


def test_a_compiled_model_keeps_its_own() -> None:
    cpu_forward.use_kernels_for_norms(config(CompilationMode.VLLM_COMPILE))
    assert [op.get_priority() for op in OPS] == [["native"], ["native"]]


def test_what_the_user_asked_for_is_left() -> None:
    cpu_forward.use_kernels_for_norms(config(rms_norm="vllm_c,native"))
    assert OPS[0].get_priority() == ["native"]
    assert OPS[1].get_priority() == ["sjd_cpu", "native"]


@pytest.mark.parametrize(
    ("kernel", "flags", "is_said"),
    [
        (CPUInt8ScaledMMLinearKernel, {"avx2": True, "avx512_vnni": False}, True),
        (CPUInt8ScaledMMLinearKernel, {"avx2": True, "avx_vnni": True}, False),
        (object, {"avx2": True}, False),
    ],
)
def test_saturating_products_of_integers_are_said(
    kernel: type, flags: dict[str, bool], is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(cpu_forward._LOGGER, "warning", said.append)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    layer = torch.nn.Linear(2, 2)
    layer.scheme = SimpleNamespace(kernel=object.__new__(kernel))  # as vLLM hangs it there
    cpu_forward.warn_of_saturation(torch.nn.Sequential(layer))
    assert [("VNNI" in text) for text in said] == [True] * is_said


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_engine_has_both(tiny_llama: Path, tmp_path: Path, is_tied: bool) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": is_tied}))
    tensors = load_file(model / "model.safetensors")
    if is_tied:
        del tensors["lm_head.weight"]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with engine(model, window=4) as running:
        assert [op.get_priority()[0] for op in OPS] == ["sjd_cpu", "sjd_cpu"]
        weights = dict(running.runner.model.named_parameters())
        down = weights["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(down, tensors["model.layers.1.mlp.down_proj.weight"])
        turned = {name for name, weight in weights.items() if weight.ndim == 2 and weight.t().is_contiguous()}
        products = {f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in PRODUCTS}
        assert turned == products | (set() if is_tied else {"lm_head.weight"})
        assert weights["model.embed_tokens.weight"].is_contiguous()
