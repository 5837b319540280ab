"""Rejected drafts leave no trace: the logits of every step equal a from-scratch prefill of what was emitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import IS_V2, Reference, engine, guided, needs_v1, sampling, scaled

from sjd_vllm.engine.fixed_noise_pool import FixedNoisePool
from sjd_vllm.engine.rejection_pool import RejectionPool

TOLERANCE = 1e-4  # of logits of order 1, in float32


Seen = list[tuple[list[int], torch.Tensor]]  # what was known of a row's sequence, and its first logits


def record_v1(runner: Any, monkeypatch: pytest.MonkeyPatch, pool_class: Any) -> Seen:
    """Grows with each step by the rows that emit."""
    seen: Seen = []
    step = pool_class.step

    def recorded(self: Any, pictures: Any, batch: Any, emitted: Any) -> Any:
        rows = runner.input_batch
        for row in {*pictures.cond.tolist(), *pictures.uncond.tolist()}:
            prefix = rows.token_ids_cpu[row, : rows.num_tokens_no_spec[row]].tolist()
            seen.append((prefix, batch.logits[batch.first[row]].clone()))
        return step(self, pictures, batch, emitted)

    monkeypatch.setattr(pool_class, "step", recorded)
    return seen


def record_v2(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The same on Model Runner V2."""
    from sjd_vllm.engine.device_states import DeviceStates

    seen: Seen = []
    step = DeviceStates.step

    def recorded(self: Any, logits: torch.Tensor, batch: Any, states: Any) -> Any:
        known = states.total_len.gpu[batch.idx_mapping].tolist()
        prefixes = [
            states.all_token_ids.gpu[slot, :count].tolist()
            for slot, count in zip(batch.idx_mapping.tolist(), known, strict=True)
        ]
        result = step(self, logits, batch, states)
        for row in result[1].nonzero().flatten().tolist():
            seen.append((prefixes[row], logits[batch.cu_num_logits_np[row]].clone()))
        return result

    monkeypatch.setattr(DeviceStates, "step", recorded)
    return seen


@pytest.mark.parametrize(
    ("redraft", "pool_class"),
    [("gumbel", FixedNoisePool), pytest.param("coupled", RejectionPool, marks=needs_v1)],
)
def test_logits_after_rejection_equal_a_fresh_prefill(
    tiny_llama: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch, redraft: str, pool_class: Any
) -> None:
    """Under chunked prefill, few blocks and preemption, for both halves of guided pairs."""
    limits = {
        "block_size": 32,
        "num_gpu_blocks_override": scaled(24, 16),
        "max_model_len": scaled(512, 256),
        "max_num_batched_tokens": 64,
        "max_num_seqs": 7,
    }
    with engine(tiny_llama, window=16, sjd={"redraft": redraft}, **limits) as running:
        seen = record_v2(monkeypatch) if IS_V2 else record_v1(running.runner, monkeypatch, pool_class)
        prompts = [[1, 2, 3], [5], [7, 8, 9] * 20, [3] * 40, [11, 12] * 30, [13]]
        settings = [None, guided(3.0, [1, 9]), guided(2.0, [4] * 50), None, guided(1.5, [2]), guided(3.0, [6] * 3)]
        params = [sampling(scaled(90, 40), seed=i, top_k=8, sjd=sjd) for i, sjd in enumerate(settings)]
        running.generate(prompts, params)
        running.assert_nothing_left()
    assert len(seen) > scaled(300, 100)
    for prefix, logits in seen[::3]:
        fresh = reference.logits([prefix])[0]
        assert torch.allclose(logits, fresh, atol=TOLERANCE), (len(prefix), float((logits - fresh).abs().max()))
