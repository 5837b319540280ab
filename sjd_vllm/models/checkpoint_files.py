"""Which files of a checkpoint's folder hold the weights that vLLM loads."""

from __future__ import annotations

from pathlib import Path


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the folder, or, where it has none, PyTorch's; as vLLM's default loader picks them."""
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))


def load_format(path: Path) -> str:
    """EngineArgs.load_format for those files; vLLM reads PyTorch's as weights alone, too."""
    return "safetensors" if any(path.glob("*.safetensors")) else "hf"
