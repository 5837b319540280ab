"""What tensor-parallel engines are asked for: greedy requests, and samples of several tokens for the law test."""

from __future__ import annotations

from typing import Any

from engine_harness import Engine, Reference, chi_square_p_value, guided, sampling
from greedy_cases import GUIDANCE, NUM_TOKENS, PROMPTS

WINDOW = 16
PROMPT = list(range(1, 30))
ALLOWED = [5, 17, 18, 40]
NUM_LAW_TOKENS = 4  # 4**4 = 256 cells
NUM_SAMPLES = 2000
PASS = 1e-4
PAIR = guided(2.0, list(range(30, 60)))


def greedy_tokens(running: Engine) -> list[list[int]]:
    """All prompts with and without guidance in one batch, at temperature 0."""
    asked = [(prompt, sjd) for prompt in PROMPTS for sjd in GUIDANCE]
    params = [sampling(NUM_TOKENS, temperature=0, sjd=sjd) for _, sjd in asked]
    return [tokens for (tokens,) in running.generate([prompt for prompt, _ in asked], params)]


def law_samples(running: Engine, sjd: dict[str, Any]) -> list[list[int]]:
    """Samples of the same few tokens, one a seed."""
    params = [
        sampling(NUM_LAW_TOKENS, seed=seed, allowed_token_ids=ALLOWED, sjd=sjd, top_k=3) for seed in range(NUM_SAMPLES)
    ]
    return [tokens for (tokens,) in running.generate([PROMPT] * NUM_SAMPLES, params)]


def p_value(samples: list[list[int]], reference: Reference, guidance: dict[str, Any] | None) -> float:
    """Of the samples under the exact joint law at this guidance."""
    return chi_square_p_value(samples, reference.joint(PROMPT, guidance, ALLOWED, NUM_LAW_TOKENS, top_k=3))
