"""Which files of a checkpoint's folder hold the weights that vLLM loads."""

from __future__ import annotations

from pathlib import Path


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the folder, or, where it has none, PyTorch's; as vLLM's default loader picks them."""
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
