"""Pixels, codes and caption vectors of every family on a GPU.

Without a GPU PyTorch's meta device takes its place: tensors there hold no numbers, but what a decoder leaves on the CPU
is found as it would be beside a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_family import MAKERS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.pixel_device import decode_on, encode_on, full_float32
from sjd_vllm.models.registry import load_family

CUDA, META = torch.device("cuda"), torch.device("meta")
VQ_NAMES = {"simplear": "_decoder"}


@pytest.fixture(params=list(MAKERS))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> ImageFamily:
    found = load_family(MAKERS[request.param](tmp_path / "checkpoint"))
    assert found is not None
    assert found.name == request.param
    return found


def random_codes(family: ImageFamily, num_pictures: int = 2) -> torch.Tensor:
    grammar = family.grammar(family.sizes[0])
    num_codes = int(grammar.code_of_column.max()) + 1
    return torch.randint(0, num_codes, (num_pictures, *grammar.grid), generator=torch.Generator().manual_seed(0))


class OnMetaAlone(TorchDispatchMode):
    """Fails where an operator is given a tensor of another device, but to bring it there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, torch.Tensor) and one.device.type != "meta" and func != torch.ops.aten._to_copy.default:
                raise RuntimeError(f"{func} was given a tensor on the {one.device}")
        return func(*args, **(kwargs or {}))


def test_nothing_of_a_decoder_stays_on_the_cpu(family: ImageFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self)  # there is no way back
    vq = getattr(family, VQ_NAMES.get(family.name, "_vq"))
    size, codes = family.sizes[0], random_codes(family)
    shape = (1, 3, size.height, size.width)
    with OnMetaAlone():
        pixels = decode_on(META, vq, codes)
        assert pixels.shape == (2, *shape[1:])
        if family.can_encode:
            assert encode_on(META, vq, torch.zeros(shape)).shape == (1, *codes.shape[1:])
        with pytest.raises(RuntimeError, match="was given a tensor on the cpu"):
            vq.decode(codes)  # the control


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_what_a_cpu_gives(family: ImageFamily) -> None:
    size, codes = family.sizes[0], random_codes(family)
    grammar = family.grammar(size)
    pictures = [grammar.tokens(one) for one in codes]
    vq = getattr(family, VQ_NAMES.get(family.name, "_vq"))
    exact = decode_on(torch.device("cpu"), vq, codes)
    on_cpu = family.decode_pixels(pictures, size)
    found_on_cpu = family.encode_pixels(on_cpu[0], size) if family.can_encode else None
    embeds_on_cpu = family.prompt_embeds("a red house", size)
    family.pixel_device = CUDA
    assert float((decode_on(CUDA, vq, codes) - exact).abs().max()) < 1e-4 * max(1, float(exact.abs().max()))
    assert np.abs(family.decode_pixels(pictures, size).astype(int) - on_cpu).max() <= 1
    if found_on_cpu is not None:
        assert float((family.encode_pixels(on_cpu[0], size) == found_on_cpu).float().mean()) > 0.98
    if embeds_on_cpu is not None:
        embeds = family.prompt_embeds("a red house", size)
        assert embeds is not None
        assert embeds.device.type == "cpu"
        assert float((embeds - embeds_on_cpu).abs().max()) < 1e-4


def test_convolutions_are_in_full_float32_and_the_setting_comes_back() -> None:
    if not torch.backends.cudnn.is_available():
        pytest.skip("this build of PyTorch has no cuDNN")
    before = torch.backends.cudnn.allow_tf32
    with full_float32():
        assert torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
