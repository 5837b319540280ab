"""The martingale test on pictures of the demo model, whose joint law cannot be enumerated.

The finished tokens are teacher-forced through Transformers with the same processing. Exact strategies give z-scores of
order 1; the biased control does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_harness import Engine, engine, guided, sampling
from transformers import AutoModelForCausalLM

from sjd_vllm.core import martingale_z_scores, process_target
from sjd_vllm.demo import captions, checkpoint_path
from sjd_vllm.models.registry import load_family

NUM_PICTURES = 24
LIMIT = 4.0
FAMILY = load_family(checkpoint_path())
assert FAMILY is not None
SIZE = FAMILY.sizes[0]
GRAMMAR = FAMILY.grammar(SIZE)
DEFAULTS = FAMILY.defaults
GUIDANCE = DEFAULTS.guidance_scale
CONDITIONAL = [FAMILY.prompt_token_ids(caption, SIZE) for caption in captions(NUM_PICTURES, seed=5)]
UNCONDITIONAL = FAMILY.negative_prompt_token_ids(None, SIZE)


@pytest.fixture(scope="module")
def running() -> Iterator[Engine]:
    # a low threshold makes the biased reuse clearly biased; the exact reuse must be exact at any
    with engine(checkpoint_path(), window=32, max_num_batched_tokens=4096, sjd={"reuse_threshold": 0.05}) as started:
        yield started


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()


def make_pictures(running: Engine, **sjd: Any) -> list[list[int]]:
    settings = guided(GUIDANCE, UNCONDITIONAL, image_size=str(SIZE), **sjd)
    params = [
        sampling(
            1, seed=seed, temperature=DEFAULTS.temperature, top_k=DEFAULTS.top_k, top_p=DEFAULTS.top_p, sjd=settings
        )
        for seed in range(NUM_PICTURES)
    ]
    return [tokens for (tokens,) in running.generate(CONDITIONAL, params)]


@torch.inference_mode()
def z_scores(model: Any, pictures: list[list[int]]) -> dict[str, float]:
    legal = GRAMMAR.legal_sets[GRAMMAR.set_of_position][None]
    probs, columns = [], []
    for prompt, tokens in zip(CONDITIONAL, pictures, strict=True):
        cond, uncond = (
            model(torch.tensor([[*start, *tokens[:-1]]])).logits[:, len(start) - 1 :, GRAMMAR.token_ids]
            for start in (prompt, UNCONDITIONAL)
        )
        probs.append(
            process_target(
                cond,
                uncond_logits=uncond,
                guidance_scale=torch.tensor([GUIDANCE]),
                legal=legal,
                temperature=torch.tensor([DEFAULTS.temperature]),
                top_k=torch.tensor([DEFAULTS.top_k]),
                top_p=torch.tensor([DEFAULTS.top_p]),
            )[0]
        )
        columns.append(torch.searchsorted(GRAMMAR.token_ids, torch.tensor(tokens)))
    groups = torch.arange(NUM_PICTURES).repeat_interleave(GRAMMAR.num_tokens)
    return martingale_z_scores(torch.cat(probs), torch.cat(columns), groups)


@pytest.mark.parametrize("redraft", ["coupled", "resample", "gumbel", "reuse"])
def test_exact_strategies_sample_the_model(running: Engine, model: Any, redraft: str) -> None:
    scores = z_scores(model, make_pictures(running, redraft=redraft))
    assert all(abs(z) < LIMIT for z in scores.values()), scores


@pytest.mark.parametrize("first_guess", ["repeat_left", "repeat_above", "left_probs", "above_probs"])
def test_exact_first_guesses_sample_the_model(running: Engine, model: Any, first_guess: str) -> None:
    scores = z_scores(model, make_pictures(running, redraft="coupled", first_guess=first_guess))
    assert all(abs(z) < LIMIT for z in scores.values()), scores


def test_plain_decoding_samples_the_model(running: Engine, model: Any) -> None:
    scores = z_scores(model, make_pictures(running, num_speculative_tokens=0))
    assert all(abs(z) < LIMIT for z in scores.values()), scores


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_biased_reuse_does_not(running: Engine, model: Any) -> None:
    scores = z_scores(model, make_pictures(running, redraft="reuse_biased"))
    assert max(abs(z) for z in scores.values()) > LIMIT, scores


def test_every_token_is_legal_and_nothing_is_left(running: Engine) -> None:
    for tokens in make_pictures(running):
        assert len(GRAMMAR.codes(tokens)) == GRAMMAR.grid[0]  # raises on an id that the grammar forbids
    running.assert_nothing_left()
