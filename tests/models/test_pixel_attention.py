"""Attention inside pixel decoders: PyTorch's, and what xformers asks of its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sjd_vllm.models import pixel_attention as module
from sjd_vllm.models.pixel_attention import pixel_attention

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def maps(device: str = "cpu", channels: int = 512, side: int = 12) -> list[Tensor]:
    """Query, key and value as the decoders make them: channels outermost in memory."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(3, 2, channels, side, side, generator=generator).to(device)
    return [one.flatten(2).transpose(1, 2) for one in made]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value


def test_it_is_attention_with_one_head() -> None:
    query, key, value = maps()
    expected = written_out(query.double(), key.double(), value.double())
    assert float((pixel_attention(query, key, value) - expected).abs().max()) < 1e-5


def test_xformers_takes_what_it_is_handed() -> None:
    """By its own rules, which can be asked without a GPU; maps as they are would be refused."""
    pytest.importorskip("xformers", reason="xformers is not installed")
    from xformers.ops.fmha.common import Inputs
    from xformers.ops.fmha.cutlass import FwOp

    def refusals(tensors: list[Tensor]) -> list[str]:
        inputs = Inputs(*tensors)
        inputs.validate_inputs()
        return [reason for reason in FwOp.not_supported_reasons(inputs) if not reason.startswith("device=")]

    for channels in (128, 512, 1024):
        assert refusals([one.contiguous() for one in maps(channels=channels)]) == []
    assert any("stride(-1)" in reason for reason in refusals(maps()))
    assert any("dtype" in reason for reason in refusals([one.contiguous().double() for one in maps()]))


@needs_gpu
def test_a_gpu_gives_the_same() -> None:
    query, key, value = maps("cuda")
    expected = written_out(*(one.cpu().double() for one in (query, key, value)))
    assert float((pixel_attention(query, key, value).cpu() - expected).abs().max()) < 1e-4


@needs_gpu
def test_xformers_is_used_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    xformers = pytest.importorskip("xformers.ops", reason="xformers is not installed")
    if torch.cuda.get_device_capability() > (9, 0):
        pytest.skip("xformers has no kernel for float32 on this GPU")
    calls = []

    def counted(*tensors: Tensor) -> Tensor:
        calls.append(len(tensors))
        return xformers.memory_efficient_attention(*tensors)

    monkeypatch.setattr(module, "_xformers_attention", lambda: counted)
    query, key, value = maps("cuda")
    expected = written_out(*(one.cpu().double() for one in (query, key, value)))
    assert float((pixel_attention(query, key, value).cpu() - expected).abs().max()) < 1e-4
    assert calls == [3]


@needs_gpu
def test_where_xformers_has_no_kernel_pytorchs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_fits(*_: Tensor) -> Tensor:
        raise NotImplementedError("no operator found")

    monkeypatch.setattr(module, "_xformers_attention", lambda: none_fits)
    query, key, value = maps("cuda")
    expected = written_out(*(one.cpu().double() for one in (query, key, value)))
    assert float((pixel_attention(query, key, value).cpu() - expected).abs().max()) < 1e-4
