"""Model Runner V2 on a CPU, its Triton kernels under Triton's interpreter.

vLLM's CPU build takes Triton for missing unless Triton has a backend named "cpu". The interpreter needs no backend, so
one that is never asked stands in for it. To be called before anything imports vllm.
"""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace
from typing import Any


def is_asked_for() -> bool:
    """Whether this test run is one on V2."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and os.environ.get("TRITON_INTERPRET") == "1"


def let_vllm_use_triton() -> None:
    """Raises ImportError where triton is not installed."""
    from triton.backends import backends

    backends.setdefault("cpu", SimpleNamespace(driver=None))
    _patch_the_language_once()


def _patch_the_language_once() -> None:
    """Triton 3.9's interpreter patches its language before every call of a kernel and takes that back after it.

    That is most of the time of V2's small kernels. Here all kernels are interpreted, so the patches may stay.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        modules = frozenset(id(value) for value in fn.__globals__.values() if isinstance(value, ModuleType))
        if modules & _language_ids() in patched:
            return interpreter._LangPatchScope()
        patched.add(modules & _language_ids())
        scope = patch(fn)
        scope.restore = lambda: None
        return scope

    interpreter._patch_lang = patch_once


def _language_ids() -> frozenset[int]:
    from triton import language

    return frozenset({id(language), id(language.core)})
