"""Which files of a checkpoint's folder hold the weights that vLLM loads."""

from __future__ import annotations

from pathlib import Path


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the folder, or, where it has none, PyTorch's; as vLLM's default loader picks them."""
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))


def load_format(path: Path) -> str:
    """EngineArgs.load_format for those files: safetensors and nothing else, where there are any.

    vLLM's "hf" reads *.bin by PyTorch's unpickler for weights alone, which runs no code of theirs.
    """
    return "safetensors" if any(path.glob("*.safetensors")) else "hf"
