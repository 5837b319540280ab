"""Two workers of vLLM's multiprocess executor: the tokens of one, and the exact law."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_harness import IS_V2, Engine, Reference, engine, scaled, strategies
from parallel_cases import NUM_LAW_TOKENS, NUM_SAMPLES, PAIR, PASS, WINDOW, greedy_tokens, law_samples, p_value


def tokens_held(worker: Any) -> list[list[int]]:
    """All token ids that a worker's batch has held: what it sampled itself, as nobody tells it the other's."""
    runner = worker.model_runner
    held: list[list[int]] = (
        runner.input_batch.token_ids_cpu if hasattr(runner, "input_batch") else runner.req_states.all_token_ids.gpu
    ).tolist()
    return held


@pytest.fixture(scope="module")
def two_workers(
    tiny_llama: Path, greedy_alone: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a test may send a function to the workers
    if IS_V2:  # the workers, which are spawned, interpret Triton's kernels too
        at_start = tmp_path_factory.mktemp("at-start")
        (at_start / "sitecustomize.py").write_text("import interpreted_v2; interpreted_v2.let_vllm_use_triton()")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(at_start), *sys.path]))
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # vLLM's sharded embedding would be compiled, by a Triton of its own
    try:
        with engine(
            tiny_llama,
            window=WINDOW,
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
            max_num_seqs=128,
        ) as running:
            yield running
    finally:
        patch.undo()


def test_greedy_tokens_are_those_of_one_worker(two_workers: Engine, greedy_alone: list[list[int]]) -> None:
    assert greedy_tokens(two_workers) == greedy_alone
    two_workers.assert_nothing_left()


@pytest.mark.parametrize("redraft", strategies("gumbel", "coupled"))
def test_joint_law_under_guidance(two_workers: Engine, reference: Reference, redraft: str) -> None:
    samples = law_samples(two_workers, {**PAIR, "redraft": redraft})
    assert (len(samples), {len(tokens) for tokens in samples}) == (NUM_SAMPLES, {NUM_LAW_TOKENS})
    assert p_value(samples, reference, PAIR) > PASS
    assert p_value(samples, reference, None) < PASS, "samples without guidance would pass too"


def test_all_ranks_sample_the_same_tokens(two_workers: Engine) -> None:
    law_samples(two_workers, PAIR if IS_V2 else {**PAIR, "redraft": "coupled"}, scaled(NUM_SAMPLES, 100))
    first, second = two_workers.llm.collective_rpc(tokens_held)
    assert len({tuple(row) for row in first}) > 50
    assert first == second
