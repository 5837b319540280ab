"""Model Runner V2 on a CPU, its Triton kernels under Triton's interpreter.

vLLM's CPU build takes Triton for missing unless Triton has a backend named "cpu". The interpreter needs no backend, so
one that is never asked stands in for it. To be called before anything imports vllm.
"""

from __future__ import annotations

import os
from types import SimpleNamespace


def is_asked_for() -> bool:
    """Whether this test run is one on V2."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and os.environ.get("TRITON_INTERPRET") == "1"


def let_vllm_use_triton() -> None:
    """Raises ImportError where triton is not installed."""
    from triton.backends import backends

    backends.setdefault("cpu", SimpleNamespace(driver=None))
