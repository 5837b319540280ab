from __future__ import annotations

from engine_fixtures import expected, reference, tiny_llama

__all__ = ["expected", "reference", "tiny_llama"]
