"""Is the engine right on this device: greedy identity and the sampling law, each with a control that must fail.

A random Llama over 64 ids in float32, the tests' own (tests/tiny_models.py), decoded by this engine with windows and
guidance, against Transformers on the CPU (tests/engine_harness.py):

greedy: every token is the likeliest one after the tokens before it, up to the arithmetic's error: its logit lies
    within the bound of the highest, relative to the deviation of the logits. On a CPU both compute alike and the bound
    is tight. On a GPU vLLM's float32 attention multiplies in TF32, so near-ties may fall otherwise, after which a plain
    comparison of two sequences would say nothing.
greedy control: guided tokens under the law without guidance must leave that bound.
law: the joint of four tokens among four ids that lie side by side, as image codes do, so that a GPU takes the Triton
    kernel; chi-square against the exact joint, with and without guidance and top-k.
law control: guided tokens against the joint without guidance must be refused.

Raises no error for a wrong answer: a row says so, and the exit code is 1. `run.py` measures nothing then.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.common import ROOT, Run, parser, runner_name
from sjd_vllm.config import ConfigError
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.rows import rounded

sys.path.append(str(ROOT / "tests"))  # the tests' harness stands there

WINDOW = 8
# Deviations of the logits that a token may lie under the highest. TF32 keeps 10 bits of a number: 1e-3 of it.
_GREEDY_BOUND = {"cpu": 1e-4, "cuda": 2e-2}
_LAW_BOUND = 1e-4
_ALLOWED = [20, 21, 22, 23]
_NUM_TOKENS, _NUM_SAMPLES, _SMALL_NUM_SAMPLES = 4, 6000, 1500
_GREEDY_TOKENS, _SMALL_GREEDY_TOKENS = 128, 32


def main() -> int:
    """A row a check; 1 if one is not passed."""
    args = parser(__doc__).parse_args()
    run = Run.from_flags(args)
    rows = run.rows("correctness", "check", "passed")
    if rows.has(check="all", passed=True):
        return 0
    prepare_environment(is_quiet=True)
    results = []
    for result in checks(run):
        rows.append(result)
        results.append(bool(result["passed"]))
    rows.append({**result, "check": "all", "passed": all(results), "value": "", "bound": "", "seconds": ""})
    return 0 if all(results) else 1


def checks(run: Run) -> Iterator[dict[str, object]]:
    """The rows of all checks, each as soon as it is done."""
    with tempfile.TemporaryDirectory() as folder, tiny_engine(Path(folder)) as (running, reference):
        name = runner_name(running.llm.llm_engine)
        for check, is_control, value, bound, seconds in _all_checks(run, running, reference):
            is_within = value <= bound if check.startswith("greedy") else value > bound
            yield {
                "check": check,
                "model_runner": name,
                "passed": is_within != is_control,
                "value": rounded(value),
                "bound": bound,
                "seconds": rounded(seconds),
            }


@contextmanager
def tiny_engine(folder: Path) -> Iterator[tuple[Any, Any]]:
    """The tests' engine over their random Llama on this device, and the same model in Transformers."""
    from engine_harness import Engine, Reference
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from sjd_vllm.plugin import register
    from tiny_models import make_tiny_llama

    register()  # for a checkout that is not installed
    model = make_tiny_llama(folder, vocab_size=64, scale=0.3)
    llm = LLM(
        model=str(model),
        speculative_config={"method": "sjd", "num_speculative_tokens": WINDOW},
        enforce_eager=not torch.cuda.is_available(),
        skip_tokenizer_init=True,
        dtype="float32",
        disable_log_stats=False,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=128,
    )
    running = Engine(llm)
    try:
        yield running, Reference(model)
    finally:
        vars(running).clear()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _all_checks(run: Run, running: Any, reference: Any) -> Iterator[tuple[str, bool, float, float, float]]:
    """Name, whether it is a control, value, bound, seconds."""
    from engine_harness import chi_square_p_value, guided, sampling
    from greedy_cases import GUIDANCE, PROMPTS

    bound = _GREEDY_BOUND[run.device.type]
    num_tokens = _SMALL_GREEDY_TOKENS if run.is_small else _GREEDY_TOKENS
    for window in (0, 3, WINDOW):
        began = time.perf_counter()
        cases = [(prompt, sjd) for prompt in PROMPTS for sjd in GUIDANCE]
        params = [
            sampling(num_tokens, temperature=0, sjd={**(sjd or {}), "num_speculative_tokens": window})
            for _, sjd in cases
        ]
        outputs = [tokens for (tokens,) in running.generate([prompt for prompt, _ in cases], params)]
        gaps = [greedy_gap(reference, *case, tokens) for case, tokens in zip(cases, outputs, strict=True)]
        yield f"greedy, window {window}", False, max(gaps), bound, time.perf_counter() - began
    unguided = [
        greedy_gap(reference, prompt, None, tokens)
        for (prompt, sjd), tokens in zip(cases, outputs, strict=True)
        if sjd is not None
    ]
    yield "greedy control", True, max(unguided), bound, 0.0

    guidance = guided(2.0, list(range(30, 60)))
    prompt = list(range(1, 30))
    samples: dict[str, list[list[int]]] = {}
    for name, sjd, processing in (
        ("law", None, {}),
        ("law, guidance", guidance, {}),
        ("law, guidance, top-k", guidance, {"top_k": 3}),
    ):
        began = time.perf_counter()
        params = [
            sampling(_NUM_TOKENS, seed=seed, allowed_token_ids=_ALLOWED, sjd=sjd, **processing)
            for seed in range(_SMALL_NUM_SAMPLES if run.is_small else _NUM_SAMPLES)
        ]
        samples[name] = [tokens for (tokens,) in running.generate([prompt] * len(params), params)]
        joint = reference.joint(prompt, sjd, _ALLOWED, _NUM_TOKENS, **processing)
        yield name, False, chi_square_p_value(samples[name], joint), _LAW_BOUND, time.perf_counter() - began
    joint = reference.joint(prompt, None, _ALLOWED, _NUM_TOKENS)
    yield "law control", True, chi_square_p_value(samples["law, guidance"], joint), _LAW_BOUND, 0.0


@torch.inference_mode()
def greedy_gap(reference: Any, prompt: list[int], sjd: dict[str, Any] | None, tokens: list[int]) -> float:
    """How far below the likeliest token one of these lies at most, in deviations of its position's logits.

    The reference reads the whole sequence at once, so a token is judged after the tokens that were written before it.
    """

    def logits(start: list[int]) -> torch.Tensor:
        sequence = torch.tensor([[*start, *tokens[:-1]]])
        out: torch.Tensor = reference.model(sequence).logits[0, len(start) - 1 :].double()
        return out

    mixed = logits(prompt)
    if sjd:
        uncond = logits(sjd["negative_prompt_token_ids"])
        mixed = uncond + sjd["guidance_scale"] * (mixed - uncond)
    chosen = mixed.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float(((mixed.amax(1) - chosen) / mixed.std(1)).max())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"correctness.py: error: {error}")
