"""Seeds, n > 1, stops, aborts, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Engine, engine, guided, sampling, scaled
from vllm import SamplingParams

from sjd_vllm.engine.drafting_rule import DraftingRule
from sjd_vllm.engine.legal_set import LegalSet

GUIDANCE = guided(3.0, [1, 9])
PROMPT = [1, 2, 3, 4]
NUM_TOKENS = scaled(100, 40)


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, window=16, max_num_seqs=32, block_size=32) as started:
        yield started


def one(running: Engine, seed: int, sjd: dict[str, Any] | None, **kwargs: Any) -> list[int]:
    return running.generate([PROMPT], [sampling(NUM_TOKENS, seed=seed, top_k=10, sjd=sjd, **kwargs)])[0][0]


@pytest.mark.parametrize("sjd", [None, GUIDANCE])
def test_same_seed_same_tokens_alone_and_in_a_batch(running: Engine, sjd: dict[str, Any] | None) -> None:
    alone = one(running, 7, sjd)
    others = [sampling(NUM_TOKENS - 20 + i, seed=i, sjd=GUIDANCE if i % 2 else None) for i in range(9)]
    prompts = [[i + 1] * (5 * i + 1) for i in range(9)]
    batched = running.generate([*prompts, PROMPT], [*others, sampling(NUM_TOKENS, seed=7, top_k=10, sjd=sjd)])
    assert batched[-1][0] == alone
    assert one(running, 8, sjd) != alone


def test_without_a_seed_requests_differ(running: Engine) -> None:
    params = [sampling(30, sjd=GUIDANCE) for _ in range(4)]
    outputs = {tuple(tokens) for (tokens,) in running.generate([PROMPT] * 4, params)}
    assert len(outputs) == 4


@pytest.mark.parametrize("seed", [5, None])
def test_several_samples_of_one_prompt(running: Engine, seed: int | None) -> None:
    """n > 1 makes independent pictures; with a seed, sample i is that of seed + i alone."""
    (samples,) = running.generate([PROMPT], [sampling(NUM_TOKENS, seed=seed, top_k=10, n=3, sjd=GUIDANCE)])
    assert len({tuple(sample) for sample in samples}) == 3
    if seed is not None:
        assert samples == [one(running, seed + i, GUIDANCE) for i in range(3)]
    running.assert_nothing_left()


def test_stop_token_ends_a_guided_request_where_it_appears(running: Engine) -> None:
    free = one(running, 3, GUIDANCE)
    stop = free[NUM_TOKENS // 2]
    first = free.index(stop)
    assert one(running, 3, GUIDANCE, stop_token_ids=[stop]) == free[: first + 1]
    running.assert_nothing_left()


def test_guidance_scale_one_is_no_guidance(running: Engine) -> None:
    assert one(running, 3, guided(1.0, [1, 9])) == one(running, 3, None)


def test_negative_prompt_longer_than_the_prompt_ends_at_the_models_length(running: Engine) -> None:
    """The companion must not reach the model's length first."""
    sjd = guided(2.0, [4] * 450)
    (tokens,) = running.generate([PROMPT], [sampling(500, seed=1, sjd=sjd)])[0]
    assert len(tokens) == 512 - 450
    running.assert_nothing_left()


def test_an_unguided_request_ends_at_the_models_length(running: Engine) -> None:
    (tokens,) = running.generate([PROMPT], [sampling(600, seed=1)])[0]
    assert len(tokens) == 512 - len(PROMPT)
    running.assert_nothing_left()


def test_logits_that_are_not_numbers_fail_their_request_alone(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = one(running, 11, GUIDANCE)
    choices = LegalSet.choices

    def poisoned(self: LegalSet, logits: torch.Tensor, span: Any, **settings: Any) -> Any:
        logits = logits.clone()
        logits[settings["rows"][settings["guidance_scale"] == 7.0]] = torch.nan
        return choices(self, logits, span, **settings)

    monkeypatch.setattr(LegalSet, "choices", poisoned)
    sick = sampling(NUM_TOKENS, seed=1, sjd=guided(7.0, [1, 9]))
    good = sampling(NUM_TOKENS, seed=11, top_k=10, sjd=GUIDANCE)
    given = [{"prompt_token_ids": PROMPT}] * 2
    outputs = running.llm.generate(given, [sick, good], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert list(outputs[1].outputs[0].token_ids) == alone
    running.assert_nothing_left()


def test_a_grammar_that_fails_in_the_engine_fails_its_request_alone(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = one(running, 11, GUIDANCE)
    rule_of = DraftingRule.of

    def failing(params: Any, *args: Any) -> DraftingRule:
        if params.guidance_scale == 7.0:
            raise RuntimeError("this grammar cannot be built")
        return rule_of(params, *args)

    monkeypatch.setattr(DraftingRule, "of", failing)
    sick = sampling(NUM_TOKENS, seed=1, sjd=guided(7.0, [1, 9]))
    good = sampling(NUM_TOKENS, seed=11, top_k=10, sjd=GUIDANCE)
    outputs = running.llm.generate([{"prompt_token_ids": PROMPT}] * 2, [sick, good], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert list(outputs[1].outputs[0].token_ids) == alone
    running.assert_nothing_left()


def test_aborted_requests_free_both_halves(running: Engine) -> None:
    llm_engine = running.llm.llm_engine
    for i in range(6):
        params: SamplingParams = sampling(200, seed=i, sjd=GUIDANCE if i % 2 else None)
        llm_engine.add_request(f"r{i}", {"prompt_token_ids": PROMPT}, params)
    for _ in range(5):
        llm_engine.step()
    assert len(running.scheduler.requests) == 9
    llm_engine.abort_request([f"r{i}" for i in range(6)])
    llm_engine.step()
    assert not llm_engine.has_unfinished_requests()
    running.assert_nothing_left()


def test_an_aborted_request_leaves_the_others_alone(running: Engine) -> None:
    alone = one(running, 11, GUIDANCE)
    llm_engine = running.llm.llm_engine
    llm_engine.add_request("goes", {"prompt_token_ids": PROMPT}, sampling(200, seed=1, sjd=GUIDANCE))
    params = sampling(NUM_TOKENS, seed=11, top_k=10, sjd=GUIDANCE)
    llm_engine.add_request("stays", {"prompt_token_ids": PROMPT}, params)
    finished = []
    for step in range(400):
        finished += [output for output in llm_engine.step() if output.finished]
        if step == 7:
            llm_engine.abort_request(["goes"])
        if not llm_engine.has_unfinished_requests():
            break
    assert [output.request_id for output in finished] == ["stays"]
    assert list(finished[0].outputs[0].token_ids) == alone
    running.assert_nothing_left()


def test_statistics_count_a_pair_as_one_request(running: Engine) -> None:
    llm_engine = running.llm.llm_engine
    for i in range(2):
        llm_engine.add_request(f"s{i}", {"prompt_token_ids": PROMPT}, sampling(60, seed=i, sjd=GUIDANCE))
    for _ in range(3):
        llm_engine.step()
    stats = running.scheduler.make_stats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs) == (2, 0)
    llm_engine.abort_request(["s0", "s1"])
    llm_engine.step()
    running.assert_nothing_left()
