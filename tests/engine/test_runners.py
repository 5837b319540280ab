"""Which of vLLM's model runners decodes, and what is particular to Model Runner V2.

What both must do alike is in the other tests of this folder, which run on either: with VLLM_USE_V2_MODEL_RUNNER=1 and
TRITON_INTERPRET=1 on V2, else on V1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import IS_V2, engine, guided, needs_v2, record_preemptions, sampling
from vllm.exceptions import VLLMValidationError

from sjd_vllm.config import ConfigError, SJDConfig
from sjd_vllm.engine import legal_set
from sjd_vllm.runner_choice import runner_name, uses_v2

PROMPTS = [[1, 2, 3], [7, 8, 9] * 15, [5]]
SETTINGS: list[dict[str, Any]] = [
    {"seed": 1, "sjd": guided(3.0, [1, 9]), "top_k": 12},
    {"seed": 2, "sjd": guided(2.0, [4] * 50), "top_k": 5, "temperature": 0.8},
    {"seed": 3},
]
NUM_TOKENS = 24


def tokens_of(model: Path, **engine_settings: Any) -> list[list[int]]:
    with engine(model, window=16, **engine_settings) as running:
        outputs = running.generate(PROMPTS, [sampling(NUM_TOKENS, **settings) for settings in SETTINGS])
        running.assert_nothing_left()
    return [tokens for (tokens,) in outputs]


def test_v1_on_a_cpu_unless_v2_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert runner_name(SJDConfig()) == "V1"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert runner_name(SJDConfig()) == "V2"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert runner_name(SJDConfig()) == "V1"


def test_v2_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM itself decides on a GPU; strategies by rejection stay on V1."""
    import vllm.triton_utils
    from vllm.platforms import current_platform

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert uses_v2(SJDConfig())
    assert not uses_v2(SJDConfig(redraft="coupled"))


def test_a_strategy_by_rejection_is_refused_where_v2_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ConfigError, match="V1 model runner only") as refusal:
        uses_v2(SJDConfig(redraft="resample"))
    assert refusal.value.param == "redraft"


def test_the_engine_says_its_runner(tiny_llama: Path) -> None:
    with engine(tiny_llama, window=4) as running:
        assert running.scheduler._counters.read()["model_runner"] == (2 if IS_V2 else 1)
        assert type(running.scheduler).__name__ == ("SJDAsyncScheduler" if IS_V2 else "SJDScheduler")
        assert type(running.runner).__name__ == ("SJDCPUModelRunnerV2" if IS_V2 else "SJDCPUModelRunner")
        assert (running.core.batch_queue is not None) is IS_V2


@needs_v2
def test_a_request_for_rejection_is_refused_by_name(tiny_llama: Path) -> None:
    parameter = None
    with engine(tiny_llama, window=4) as running:
        try:  # a kept exception would keep the engine alive, by its traceback
            running.generate([[1]], [sampling(4, sjd={"redraft": "coupled"})])
        except VLLMValidationError as error:
            assert "this engine has V2" in str(error)
            parameter = error.parameter
        running.assert_nothing_left()
    assert parameter == "redraft"


@needs_v2
def test_scheduling_does_not_show(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps handed out one by one or ahead of time, with room and without: the same tokens."""
    expected = tokens_of(tiny_llama, is_async=False)
    assert tokens_of(tiny_llama, is_async=True) == expected
    limits = {
        "block_size": 32,
        "num_gpu_blocks_override": 8,
        "max_model_len": 128,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 5,
    }
    for is_async in (False, True):
        assert tokens_of(tiny_llama, is_async=is_async, **limits) == expected


@needs_v2
def test_pairs_that_are_torn_apart_while_a_step_is_out(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preemption of one half with the next step handed out already: both come back, with the same tokens."""
    sjd = guided(3.0, [1, 9])
    params = [sampling(60, seed=seed, top_k=10, sjd=sjd) for seed in range(4)]
    with engine(tiny_llama, window=8, block_size=32) as roomy:
        expected = roomy.generate([PROMPTS[0]] * 4, params)
    with engine(tiny_llama, window=8, block_size=32, num_gpu_blocks_override=14, max_model_len=128) as small:
        preempted = record_preemptions(small, monkeypatch)
        assert small.generate([PROMPTS[0]] * 4, params) == expected
        assert {small.scheduler.pairs.is_companion(request_id) for request_id in preempted} == {True, False}
        small.assert_nothing_left()


@needs_v2
def test_the_gpus_kernel_chooses_the_same(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernel, under the interpreter, in place of the compiled pass of a CPU."""
    from sjd_kernels.gumbel_choices import gumbel_choices

    expected = tokens_of(tiny_llama)
    calls = 0

    def by_kernel(logits: Any, first: int, num_columns: int, **per_row: Any) -> Any:
        nonlocal calls
        calls += 1
        on_device = {name: torch.from_numpy(values) for name, values in per_row.items()}
        return gumbel_choices(torch.from_numpy(logits), first, num_columns, **on_device).numpy()

    monkeypatch.setattr(legal_set, "gumbel_choices_cpu", by_kernel)
    assert tokens_of(tiny_llama) == expected
    assert calls > 5
