"""The random Llama of the engine's tests and its references, for every folder whose tests start engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_harness import Reference
from greedy_cases import GUIDANCE, NUM_TOKENS, PROMPTS

from tiny_models import make_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over 64 ids whose next token depends strongly on the prefix."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), vocab_size=64, scale=0.3)


@pytest.fixture(scope="session")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


@pytest.fixture(scope="session")
def expected(reference: Reference) -> dict[tuple[int, int], list[int]]:
    """Greedy tokens by Transformers, by the numbers of prompt and guidance."""
    return {
        (i, j): reference.greedy(prompt, sjd, NUM_TOKENS)
        for i, prompt in enumerate(PROMPTS)
        for j, sjd in enumerate(GUIDANCE)
    }
