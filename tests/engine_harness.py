"""A real vLLM engine in this process, and references computed by Transformers."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before vllm is imported: one process, so that a test can look inside, and threads that share two cores well.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import interpreted_v2
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.platforms.cpu import CpuPlatform

IS_V2 = interpreted_v2.is_asked_for()
needs_v2 = pytest.mark.skipif(not IS_V2, reason="Model Runner V2 is tested in a run of its own, see the Makefile")
needs_v1 = pytest.mark.skipif(IS_V2, reason="strategies by rejection run on vLLM's V1 model runner only")


class Engine:
    """vllm.LLM with method sjd, and the parts of it that tests look at."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        core = llm.llm_engine.engine_core.engine_core
        self.core = core
        self.scheduler = core.scheduler
        # Workers that are processes of their own cannot be looked into.
        driver = getattr(core.model_executor, "driver_worker", None)
        self.runner = driver and driver.worker.model_runner

    def generate(
        self, prompts: Sequence[Sequence[int] | dict[str, Any]], params: Sequence[SamplingParams]
    ) -> list[list[list[int]]]:
        """Token ids of every prompt's outputs; a prompt is token ids, or vLLM's form of any other."""
        given = [prompt if isinstance(prompt, dict) else {"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(given, list(params), use_tqdm=False)
        return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]

    def assert_nothing_left(self) -> None:
        """No request, queue entry, pair, block, companion or stored window remains."""
        for _ in range(3):  # the workers hear of the last finished requests with the next step, or the one after it
            self.core.step_fn()
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert len(self.scheduler.pairs) == 0
        assert self.scheduler.kv_cache_manager.usage == 0
        if self.runner is None:
            return
        assert len(self.runner._sjd) == 0
        assert not self.runner._sjd.num_rules
        assert not (self.runner.req_states.req_id_to_index if IS_V2 else self.runner.requests)


def scaled(full: Any, small: Any) -> Any:
    """How much a test does: `small` where an interpreter runs the kernels, which takes a hundred times as long."""
    return small if IS_V2 else full


def strategies(*names: str) -> list[Any]:
    """Parameters of a test, of which those that the runner under test cannot do are skipped."""
    return [pytest.param(name, marks=() if name == "gumbel" else needs_v1) for name in names]


@contextmanager
def _scheduling(*, is_async: bool) -> Iterator[None]:
    """vLLM switches asynchronous scheduling off on CPUs, because it gains nothing there; it works all the same."""
    update = CpuPlatform.check_and_update_config

    def updated(vllm_config: Any) -> None:
        update(vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_async

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(updated))
        yield


@contextmanager
def engine(
    model: Path, *, window: int = 16, sjd: dict[str, Any] | None = None, is_async: bool = IS_V2, **kwargs: Any
) -> Iterator[Engine]:
    """Start an engine and take it down again, so that the next module can have its own.

    is_async: whether a step is scheduled while the one before is computed, as Model Runner V2 does it on a GPU.
    """
    with _scheduling(is_async=is_async):
        llm = _start(model, window, sjd, kwargs)
    running = Engine(llm)
    try:
        yield running
    finally:
        # A caller, or a failed test's traceback, may still hold the Engine; vLLM itself must go now, because its
        # destructor takes the process groups of a later engine with it.
        vars(running).clear()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _start(model: Path, window: int, sjd: dict[str, Any] | None, kwargs: dict[str, Any]) -> LLM:
    return LLM(
        model=str(model),
        speculative_config={"method": "sjd", "num_speculative_tokens": window, **(sjd or {})},
        enforce_eager=True,
        skip_tokenizer_init=True,
        dtype="float32",
        disable_log_stats=False,
        **{"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, **kwargs},
    )


def record_preemptions(running: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the id of every half that is preempted from now on."""
    preempted: list[str] = []
    preempt = running.scheduler._preempt_request

    def recorded(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    monkeypatch.setattr(running.scheduler, "_preempt_request", recorded)
    return preempted


def sampling(max_tokens: int, *, temperature: float = 1.0, **kwargs: Any) -> SamplingParams:
    """SamplingParams for token ids in and out; `sjd` holds our own settings."""
    extra_args = kwargs.pop("sjd", None)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        detokenize=False,
        ignore_eos=True,
        extra_args=extra_args,
        **kwargs,
    )


def guided(scale: float, negative: Sequence[int], **kwargs: Any) -> dict[str, Any]:
    """extra_args of a guided request."""
    return {"guidance_scale": scale, "negative_prompt_token_ids": list(negative), **kwargs}


class Reference:
    """The same checkpoint in Transformers, computed from scratch at every prefix."""

    def __init__(self, model: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(self, sequences: list[list[int]]) -> Tensor:
        """float32 [N, vocabulary] after N sequences of one length."""
        return self.model(torch.tensor(sequences), logits_to_keep=1).logits[:, -1]

    def mixed_logits(self, prompt: Sequence[int], sjd: dict[str, Any] | None, prefixes: list[list[int]]) -> Tensor:
        """Guided (or plain) logits after prompt + each of some prefixes of one length."""
        cond = self.logits([[*prompt, *prefix] for prefix in prefixes])
        if not sjd:
            return cond
        uncond = self.logits([[*sjd["negative_prompt_token_ids"], *prefix] for prefix in prefixes])
        return uncond + sjd["guidance_scale"] * (cond - uncond)

    def greedy(self, prompt: Sequence[int], sjd: dict[str, Any] | None, num_tokens: int) -> list[int]:
        """Plain greedy decoding."""
        out: list[int] = []
        for _ in range(num_tokens):
            out.append(int(self.mixed_logits(prompt, sjd, [out]).argmax()))
        return out

    def joint(
        self,
        prompt: Sequence[int],
        sjd: dict[str, Any] | None,
        allowed: Sequence[int],
        num_tokens: int,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> dict[tuple[int, ...], float]:
        """The exact probability of every continuation over the allowed ids."""
        joint: dict[tuple[int, ...], float] = {(): 1.0}
        columns = torch.tensor(sorted(allowed))
        for length in range(num_tokens):
            prefixes = [list(p) for p in itertools.product(sorted(allowed), repeat=length)]
            prefixes = [p for p in prefixes if joint.get(tuple(p), 0) > 0]
            logits = self.mixed_logits(prompt, sjd, prefixes)[:, columns].double()
            for prefix, row in zip(prefixes, logits, strict=True):
                for token, p in zip(columns.tolist(), _process(row, top_k, top_p).tolist(), strict=True):
                    joint[(*prefix, token)] = joint[tuple(prefix)] * p
        return {sequence: p for sequence, p in joint.items() if len(sequence) == num_tokens}


def _process(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k then top-p in the plainest way, independent of the code under test. logits [V] -> probs [V]."""
    order = logits.argsort(descending=True, stable=True)
    probs = logits[order].softmax(0)
    if top_k > 0:
        probs[top_k:] = 0
        probs /= probs.sum()
    if top_p < 1:
        probs[(probs.cumsum(0) - probs) >= top_p] = 0
        probs /= probs.sum()
    return torch.zeros_like(probs).scatter_(0, order, probs)


def chi_square_p_value(samples: list[list[int]], joint: dict[tuple[int, ...], float], min_expected: float = 5) -> float:
    """p-value of the samples under the joint; cells that expect too few are one cell."""
    counts: dict[tuple[int, ...], int] = {}
    for sample in samples:
        counts[tuple(sample)] = counts.get(tuple(sample), 0) + 1
    impossible = [sequence for sequence in counts if joint.get(sequence, 0) == 0]
    if impossible:
        return 0.0
    n = len(samples)
    big = [sequence for sequence, p in joint.items() if n * p >= min_expected]
    observed = [float(counts.get(sequence, 0)) for sequence in big]
    expected = [n * joint[sequence] for sequence in big]
    observed.append(n - sum(observed))
    expected.append(n - sum(expected))
    if expected[-1] < min_expected:
        observed[-2:] = [sum(observed[-2:])]
        expected[-2:] = [sum(expected[-2:])]
    return float(stats.chisquare(observed, expected, sum_check=False).pvalue)
