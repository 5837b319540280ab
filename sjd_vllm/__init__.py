"""Exact speculative Jacobi decoding of image tokens on stock vLLM, with classifier-free guidance.

>>> from sjd_vllm import ImagePipeline
>>> ImagePipeline().generate("a calm lake at sunset, a red house on the left", seed=7).images[0].save("house.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sjd_vllm.images.pipeline import ImagePipeline

__all__ = ["ImagePipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported when asked for: vLLM calls our plugin in each of its processes, and the core needs torch alone.
    if name == "ImagePipeline":
        from sjd_vllm.images.pipeline import ImagePipeline

        return ImagePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
