"""Admission in engines of other kinds than the usual one."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_harness import engine, guided, sampling
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError

PROMPT = [1, 2, 3]


def test_one_sequence_slot_refuses_guidance(tiny_llama: Path) -> None:
    with engine(tiny_llama, window=4, max_num_seqs=1) as single:
        with pytest.raises(VLLMValidationError, match="max-num-seqs"):
            single.generate([PROMPT], [sampling(10, sjd=guided(3.0, [1]))])
        assert len(single.generate([PROMPT], [sampling(10)])[0][0]) == 10


def test_an_engine_without_sjd_refuses_our_settings(tiny_llama: Path) -> None:
    """Guidance fails closed: a plain engine would ignore it, so it is refused there too."""
    llm = LLM(
        model=str(tiny_llama),
        enforce_eager=True,
        skip_tokenizer_init=True,
        dtype="float32",
        kv_cache_memory_bytes=64 << 20,
    )
    try:
        plain = SamplingParams(max_tokens=5, temperature=0, detokenize=False)
        assert len(llm.generate([{"prompt_token_ids": PROMPT}], plain, use_tqdm=False)[0].outputs[0].token_ids) == 5
        with pytest.raises(VLLMValidationError, match="speculative-model"):
            llm.generate([{"prompt_token_ids": PROMPT}], sampling(5, sjd=guided(3.0, [1])), use_tqdm=False)
    finally:
        del llm
        cleanup_dist_env_and_memory()
