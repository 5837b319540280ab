"""What tensor-parallel engines are asked for: greedy requests, and samples of several tokens for the law test."""

from __future__ import annotations

from typing import Any

from engine_harness import Engine, Reference, chi_square_p_value, guided, sampling, scaled
from greedy_cases import GUIDANCE, NUM_TOKENS, PROMPTS

WINDOW = 16
PROMPT = list(range(1, 30))
ALLOWED = [5, 17, 18, 40]
NUM_LAW_TOKENS = 4  # 4**4 = 256 cells
NUM_SAMPLES = scaled(2000, 200)
PASS = 1e-4
PAIR = guided(2.0, list(range(30, 60)))


def greedy_tokens(running: Engine) -> list[list[int]]:
    """Prompts with and without guidance in one batch, at temperature 0."""
    asked = [(prompt, sjd) for prompt in PROMPTS[: scaled(4, 2)] for sjd in GUIDANCE]
    params = [sampling(NUM_TOKENS, temperature=0, sjd=sjd) for _, sjd in asked]
    return [tokens for (tokens,) in running.generate([prompt for prompt, _ in asked], params)]


def law_samples(running: Engine, sjd: dict[str, Any], num_samples: int = NUM_SAMPLES) -> list[list[int]]:
    """Samples of the same few tokens, one a seed."""
    params = [
        sampling(NUM_LAW_TOKENS, seed=seed, allowed_token_ids=ALLOWED, sjd=sjd, top_k=3) for seed in range(num_samples)
    ]
    return [tokens for (tokens,) in running.generate([PROMPT] * num_samples, params)]


def p_value(samples: list[list[int]], reference: Reference, guidance: dict[str, Any] | None) -> float:
    """Of the samples under the exact joint law at this guidance."""
    return chi_square_p_value(samples, reference.joint(PROMPT, guidance, ALLOWED, NUM_LAW_TOKENS, top_k=3))
