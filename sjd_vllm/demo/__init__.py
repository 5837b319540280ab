"""The demo model that is shipped with the package: a small text-to-landscape model, its data and its training."""

from pathlib import Path

from sjd_vllm.demo.captions import captions

__all__ = ["captions", "checkpoint_path"]


def checkpoint_path() -> Path:
    """Folder of the shipped checkpoint, for `from_pretrained` and for vLLM."""
    return Path(__file__).parent / "checkpoint"
