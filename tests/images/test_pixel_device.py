"""Where pixels are computed: chosen by the setting, the GPU that is there and its free memory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from sjd_vllm.config import ConfigError, SJDConfig
from sjd_vllm.images.engine import engine_settings
from sjd_vllm.images.pixel_device import place_pixels
from sjd_vllm.models.demo.family import DemoFamily
from sjd_vllm.models.family import ImageFamily, ImageSize, Pixels
from sjd_vllm.models.registry import load_family


@pytest.fixture
def family(painter: Path) -> ImageFamily:
    loaded = load_family(painter)
    assert loaded is not None
    return loaded


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A GPU without free memory; a list that grows by the device and the pixels of each trial."""
    trials: list[tuple[str, int]] = []
    decode = DemoFamily.decode_pixels

    def decode_pixels(self: DemoFamily, token_ids: list[list[int]], size: ImageSize) -> Pixels:
        trials.append((self.pixel_device.type, len(token_ids) * size.width * size.height))
        if self.pixel_device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")
        return decode(self, token_ids, size)

    monkeypatch.setattr(DemoFamily, "decode_pixels", decode_pixels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return trials


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_pixels_are_computed_on_the_cpu(family: ImageFamily) -> None:
    for asked in ("auto", "cpu"):
        place_pixels(family, asked)
        assert family.pixel_device == torch.device("cpu")
    with pytest.raises(ConfigError, match="pixel_device 'cuda:1' needs a GPU"):
        place_pixels(family, "cuda:1")


def test_the_cpu_build_of_vllm_keeps_to_the_cpu(family: ImageFamily, crowded: list[tuple[str, int]]) -> None:
    """Even where PyTorch sees a GPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this is vLLM's GPU build")
    place_pixels(family, "auto")
    assert family.pixel_device.type == "cpu"
    assert crowded == []


def test_without_free_memory_the_cpu_takes_over_with_a_warning(
    family: ImageFamily,
    crowded: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("sjd_vllm.images.pixel_device._automatic", lambda: "cuda")
    logger = logging.getLogger("vllm.sjd_vllm")
    caplog.set_level(logging.WARNING, logger=logger.name)  # vLLM's own may be higher
    logger.addHandler(caplog.handler)
    try:
        place_pixels(family, "auto")
    finally:
        logger.removeHandler(caplog.handler)
    assert family.pixel_device.type == "cpu"
    assert "lower gpu_memory_utilization" in caplog.text
    assert "Tried to allocate 2.00 GiB." in caplog.text
    assert "And more" not in caplog.text
    ((device, num_pixels),) = crowded
    assert device == "cuda"
    assert num_pixels >= 1 << 20, "as many as any family decodes at once"


def test_a_gpu_that_was_asked_for_by_name_is_not_left_in_silence(
    family: ImageFamily, crowded: list[tuple[str, int]]
) -> None:
    with pytest.raises(ConfigError, match="no memory for pixels") as raised:
        place_pixels(family, "cuda")
    assert raised.value.param == "pixel_device"
    assert len(crowded) == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "", None, 0])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="pixel_device must be auto, cpu, cuda or cuda:NUMBER"):
        SJDConfig(pixel_device=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "share"), [("auto", 0.85), ("cuda:1", 0.85), ("cpu", None)])
def test_an_engine_on_a_gpu_leaves_room_for_pixels(
    family: ImageFamily, monkeypatch: pytest.MonkeyPatch, device: str, share: float | None
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    settings = engine_settings(family, SJDConfig(pixel_device=device), max_batch_size=2, max_model_len=128)
    assert settings.get("gpu_memory_utilization") == share
