"""What cannot be honoured is refused with the setting's name, and harms nobody else's request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_harness import Engine, engine, guided, sampling
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, window=8, block_size=32, num_gpu_blocks_override=18) as started:
        yield started


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("logprobs", {"logprobs": 1}),
        ("prompt_logprobs", {"prompt_logprobs": 1}),
        ("presence_penalty", {"presence_penalty": 0.5}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("repetition_penalty", {"repetition_penalty": 1.1}),
        ("min_tokens", {"min_tokens": 3}),
        ("min_p", {"min_p": 0.1}),
        ("logit_bias", {"logit_bias": {3: 1.0}}),
        # without a tokenizer vLLM refuses this one before we do
        ("Structured outputs", {"structured_outputs": StructuredOutputsParams(choice=["a"])}),
        ("guidance_scale", {"sjd": {"guidance_scale": 0, "negative_prompt_token_ids": [1]}}),
        ("guidance_scale", {"sjd": {"guidance_scale": -2.0, "negative_prompt_token_ids": [1]}}),
        ("guidance_scale", {"sjd": {"guidance_scale": float("nan"), "negative_prompt_token_ids": [1]}}),
        ("guidance_scale", {"sjd": {"guidance_scale": "3", "negative_prompt_token_ids": [1]}}),
        ("negative_prompt_token_ids", {"sjd": {"guidance_scale": 3.0}}),
        ("negative_prompt_token_ids", {"sjd": guided(3.0, [64])}),
        ("negative_prompt_token_ids", {"sjd": guided(3.0, [1] * 512)}),
        ("num_speculative_tokens", {"sjd": {"num_speculative_tokens": 9}}),
        ("num_speculative_tokens", {"sjd": {"num_speculative_tokens": -1}}),
        ("redraft", {"sjd": {"redraft": "couple"}}),
        ("first_guess", {"sjd": {"first_guess": "above_probs"}}),
        ("image_size", {"sjd": {"image_size": "96x96"}}),
        ("KV blocks", {"sjd": guided(3.0, [1] * 100)}),
    ],
)
def test_refused_with_its_name(running: Engine, name: str, settings: dict[str, Any]) -> None:
    max_tokens = 400 if name == "KV blocks" else 10
    with pytest.raises(VLLMValidationError, match=name):
        running.generate([PROMPT], [sampling(max_tokens, **settings)])
    running.assert_nothing_left()


def test_bad_words_are_refused_by_name(running: Engine) -> None:
    params = sampling(10)
    params._bad_words_token_ids = [[3]]
    params.bad_words = ["x"]
    with pytest.raises(VLLMValidationError, match="bad_words"):
        running.generate([PROMPT], [params])


def test_an_unknown_strategy_gets_the_nearest_name(running: Engine) -> None:
    with pytest.raises(VLLMValidationError, match="Did you mean 'coupled'"):
        running.generate([PROMPT], [sampling(10, sjd={"redraft": "couple"})])


def test_a_refusal_harms_no_other_request(running: Engine) -> None:
    llm_engine = running.llm.llm_engine
    params = sampling(30, temperature=0, sjd=guided(3.0, [1, 9]))
    ((alone,),) = running.generate([PROMPT], [params])
    llm_engine.add_request("good", {"prompt_token_ids": PROMPT}, params)
    llm_engine.step()
    with pytest.raises(VLLMValidationError):
        llm_engine.add_request("bad", {"prompt_token_ids": PROMPT}, sampling(10, sjd={"guidance_scale": 0}))
    outputs: list[Any] = []
    while llm_engine.has_unfinished_requests():
        outputs = llm_engine.step()
    assert list(outputs[-1].outputs[0].token_ids) == alone
    running.assert_nothing_left()
