"""The gate: an engine that is right passes all checks, and what is wrong does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from engine_harness import Reference, guided

from benchmarks.gpu.common import RUNNER_SWITCH, Run
from benchmarks.gpu.correctness import checks, greedy_gap
from tiny_models import make_tiny_llama


@pytest.mark.skipif(
    os.environ.get(RUNNER_SWITCH) == "1" and not torch.cuda.is_available(),
    reason="takes over ten minutes under Triton's interpreter; tests/engine tests the same on V2",
)
def test_every_check(tmp_path: Path) -> None:
    results = list(checks(Run(is_small=True, output=tmp_path, work=tmp_path)))
    assert [result["check"] for result in results if not result["passed"]] == []
    assert sum("control" in str(result["check"]) for result in results) == 2
    assert len(results) == 8


def test_the_greedy_gap(tmp_path: Path) -> None:
    reference = Reference(make_tiny_llama(tmp_path, vocab_size=64, scale=0.3))
    prompt, sjd = [1, 2, 3], guided(3.0, [1, 9])
    for guidance in (None, sjd):
        tokens = reference.greedy(prompt, guidance, 24)
        assert greedy_gap(reference, prompt, guidance, tokens) < 1e-5
        for place in (0, 11, 23):
            wrong = [*tokens]
            order = reference.mixed_logits(prompt, guidance, [tokens[:place]])[0].argsort(descending=True)
            wrong[place] = int(order[5])
            assert greedy_gap(reference, prompt, guidance, wrong[: place + 1]) > 2e-2
    assert torch.isfinite(torch.tensor(greedy_gap(reference, prompt, sjd, [0] * 24)))
