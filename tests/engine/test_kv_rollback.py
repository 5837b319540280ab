"""Rejected drafts leave no trace: the logits of every step equal a from-scratch prefill of what was emitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Reference, engine, guided, sampling

import sjd_vllm.engine.v1_runner as v1_runner

TOLERANCE = 1e-4  # of logits of order 1, in float32


def test_logits_after_rejection_equal_a_fresh_prefill(
    tiny_llama: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under chunked prefill, few blocks and preemption, for both halves of guided pairs."""
    seen: list[tuple[list[int], torch.Tensor]] = []
    limits = {"block_size": 32, "num_gpu_blocks_override": 24, "max_num_batched_tokens": 64, "max_num_seqs": 7}
    with engine(tiny_llama, window=16, **limits) as running:
        step_pictures = v1_runner.step_pictures

        def recorded(pictures: list[Any], batch: Any, emitted: torch.Tensor) -> None:
            rows = running.runner.input_batch
            for picture in pictures:
                for row in {picture.cond, picture.uncond}:
                    prefix = rows.token_ids_cpu[row, : rows.num_tokens_no_spec[row]].tolist()
                    seen.append((prefix, batch.logits_of([row], 0)[0, 0].clone()))
            step_pictures(pictures, batch, emitted)

        monkeypatch.setattr(v1_runner, "step_pictures", recorded)
        prompts = [[1, 2, 3], [5], [7, 8, 9] * 20, [3] * 40, [11, 12] * 30, [13]]
        settings = [None, guided(3.0, [1, 9]), guided(2.0, [4] * 50), None, guided(1.5, [2]), guided(3.0, [6] * 3)]
        params = [sampling(90, seed=i, top_k=8, sjd=sjd) for i, sjd in enumerate(settings)]
        running.generate(prompts, params)
        running.assert_nothing_left()
    assert len(seen) > 300
    for prefix, logits in seen[::3]:
        fresh = reference.logits([prefix])[0]
        assert torch.allclose(logits, fresh, atol=TOLERANCE), (len(prefix), float((logits - fresh).abs().max()))
