"""What every image family must show on a tiny random checkpoint, against a reference of the same architecture.

A reference maps the token ids of one sequence, as the engine sees them, to float32 logits [L, V], one row after each
token. It is Transformers' model, or a plain PyTorch rendering of the published architecture that shares no code with
the model class under test.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Engine, chi_square_p_value, guided, sampling
from torch import Tensor

from sjd_vllm.engine.fixed_noise_pool import FixedNoisePool
from sjd_vllm.models.family import ImageFamily, ImageSize

FullLogits = Callable[[list[int]], Tensor]

TOLERANCE = 1e-4  # of float32 logits, relative to the largest of a row where that is above 1
LAW_PASS = 1e-4  # p-value; seeds are fixed, so it is one number


def picture_params(
    family: ImageFamily, size: ImageSize, prompt: str, *, temperature: float, guidance_scale: float = 3.0, **kwargs: Any
) -> Any:
    """SamplingParams of one guided picture, as the front doors make them."""
    negative = family.unconditional_token_ids(family.prompt_token_ids(prompt, size), size)
    window = kwargs.pop("num_speculative_tokens", None)
    sjd = guided(guidance_scale, negative, image_size=str(size))
    if window is not None:
        sjd["num_speculative_tokens"] = window
    return sampling(family.grammar(size).num_tokens, temperature=temperature, sjd=sjd, **kwargs)


def engine_prompt(family: ImageFamily, size: ImageSize, prompt: str) -> dict[str, Any]:
    """The conditional prompt in the form that vLLM takes offline."""
    token_ids = family.prompt_token_ids(prompt, size)
    embeds = family.prompt_embeds(prompt, size)
    if embeds is None:
        return {"prompt_token_ids": token_ids}
    return {"prompt_token_ids": token_ids, "prompt_embeds": embeds, "prompt_is_token_ids": [False] * len(token_ids)}


@contextmanager
def recorded_windows(running: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[int], int, Tensor]]]:
    """A list that grows by every row of every step: its tokens with the drafts, how many are drafts, its logits."""
    seen: list[tuple[list[int], int, Tensor]] = []
    step = FixedNoisePool.step

    def recorded(self: Any, pictures: Any, batch: Any, emitted: Any) -> Any:
        rows = running.runner.input_batch
        for row in sorted({*pictures.cond.tolist(), *pictures.uncond.tolist()}):
            num_drafts = int(batch.num_drafts[row])
            end = int(rows.num_tokens_no_spec[row]) + num_drafts
            first = int(batch.first[row])
            tokens = rows.token_ids_cpu[row, :end].tolist()
            seen.append((tokens, num_drafts, batch.logits[first : first + num_drafts + 1].clone()))
        return step(self, pictures, batch, emitted)

    with monkeypatch.context() as patched:
        patched.setattr(FixedNoisePool, "step", recorded)
        yield seen


@contextmanager
def recorded_inputs(running: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """A list that grows by the tensors that what vLLM compiles is given in every step."""
    given: list[Tensor] = []
    inner = running.runner.model.model
    forward = inner.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        given.extend(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return forward(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(inner, "forward", recorded)
        yield given


def check_inputs_lie_still(running: Engine, given: Sequence[Tensor]) -> None:
    """All are the runner's own buffers: a CUDA graph reads its inputs where they lay when it was captured."""
    runner = running.runner
    buffers = [runner.input_ids.gpu, runner.positions, runner.inputs_embeds.gpu]
    if runner.uses_mrope:
        buffers.append(runner.mrope_positions.gpu)
    addresses = {buffer.data_ptr() for buffer in buffers}
    assert len(given) >= 2
    for tensor in given:
        assert tensor.data_ptr() in addresses, f"{list(tensor.shape)} {tensor.dtype} was made for this step"


def check_window_logits(
    running: Engine,
    reference: FullLogits,
    family: ImageFamily,
    size: ImageSize,
    prompt: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    columns: Sequence[int] | None = None,
) -> None:
    """Logits after the prompt and after every draft of every window, for both halves, are the reference's.

    What vLLM compiles of the model is given buffers that lie still.

    Args:
        columns: token ids to compare; by default those that the grammar allows anywhere.
    """
    ids = torch.as_tensor(family.grammar(size).token_ids if columns is None else columns)
    with recorded_windows(running, monkeypatch) as seen, recorded_inputs(running, monkeypatch) as given:
        running.generate(
            [engine_prompt(family, size, prompt)], [picture_params(family, size, prompt, temperature=1, seed=3)]
        )
    check_inputs_lie_still(running, given)
    assert seen[0][1] == 0, "the first row is the prompt's own"
    assert max(num_drafts for _, num_drafts, _ in seen) >= 4
    for tokens, num_drafts, logits in seen:
        expected = reference(tokens)[-num_drafts - 1 :, ids]
        got = logits[:, ids].float()
        scale = expected.abs().amax(dim=1, keepdim=True).clamp_min(1)
        worst = float(((got - expected).abs() / scale).max())
        assert worst < TOLERANCE, (len(tokens), num_drafts, worst)


def reference_picture(
    reference: FullLogits, family: ImageFamily, size: ImageSize, prompt: str, guidance_scale: float
) -> list[int]:
    """Plain guided greedy decoding of a whole picture, one token a forward."""
    grammar = family.grammar(size)
    cond = family.prompt_token_ids(prompt, size)
    uncond = family.unconditional_token_ids(cond, size)
    out: list[int] = []
    for position in range(grammar.num_tokens):
        legal = grammar.token_ids[grammar.legal_sets[grammar.set_of_position[position]]]
        if len(legal) == 1:
            out.append(int(legal[0]))
            continue
        c, u = reference([*cond, *out])[-1, legal], reference([*uncond, *out])[-1, legal]
        out.append(int(legal[(u + guidance_scale * (c - u)).argmax()]))
    return out


def check_greedy_picture(
    running: Engine,
    reference: FullLogits,
    family: ImageFamily,
    size: ImageSize,
    prompt: str,
    guidance_scale: float = 3.0,
    windows: Sequence[int] = (0, 8),
) -> list[int]:
    """A whole guided picture at temperature 0 equals the reference loop token for token; returns its tokens."""
    expected = reference_picture(reference, family, size, prompt, guidance_scale)
    params = [
        picture_params(
            family, size, prompt, temperature=0, guidance_scale=guidance_scale, num_speculative_tokens=window
        )
        for window in windows
    ]
    outputs = running.generate([engine_prompt(family, size, prompt)] * len(windows), params)
    for window, (tokens,) in zip(windows, outputs, strict=True):
        assert tokens == expected, f"window {window}"
    running.assert_nothing_left()
    return expected


def check_law(
    running: Engine,
    reference: FullLogits,
    family: ImageFamily,
    size: ImageSize,
    prompt: str,
    *,
    guidance_scale: float = 2.0,
    num_tokens: int = 3,
    num_samples: int = 3000,
) -> None:
    """The joint law of a picture's first tokens over a few codes is the exact one; without guidance it is not.

    The legal ids are cut to four codes, so that the joint can be written down.
    """
    grammar = family.grammar(size)
    codes = grammar.token_ids[grammar.code_of_column >= 0]
    allowed = codes[:: max(1, len(codes) // 4)][:4].tolist()
    cond = family.prompt_token_ids(prompt, size)
    uncond = family.unconditional_token_ids(cond, size)

    def joint(scale: float) -> dict[tuple[int, ...], float]:
        out: dict[tuple[int, ...], float] = {}
        for sequence in itertools.product(allowed, repeat=num_tokens):
            c = reference([*cond, *sequence])[len(cond) - 1 : -1][:, allowed].double()
            u = reference([*uncond, *sequence])[len(uncond) - 1 : -1][:, allowed].double()
            probs = (u + scale * (c - u)).softmax(-1)
            chosen = [probs[i, allowed.index(token)] for i, token in enumerate(sequence)]
            out[sequence] = float(torch.stack(chosen).prod())
        return out

    params = [
        sampling(num_tokens, seed=seed, allowed_token_ids=allowed, sjd=guided(guidance_scale, uncond))
        for seed in range(num_samples)
    ]
    samples = [tokens for (tokens,) in running.generate([engine_prompt(family, size, prompt)] * num_samples, params)]
    assert chi_square_p_value(samples, joint(guidance_scale)) > LAW_PASS
    assert chi_square_p_value(samples, joint(1.0)) < LAW_PASS, "this checkpoint could not show lost guidance"


_TWO_RANKS = """
import json, sys
import torch
from engine_harness import sampling
from vllm import LLM

def main():
    given = json.loads(sys.stdin.read())
    llm = LLM(model=given["model"], tensor_parallel_size=2, distributed_executor_backend="mp",
              speculative_config={"method": "sjd", "num_speculative_tokens": 8}, enforce_eager=True,
              skip_tokenizer_init=True, dtype="float32", kv_cache_memory_bytes=32 << 20, max_num_seqs=8,
              **given["engine_args"])
    params = sampling(given["num_tokens"], temperature=0, sjd=given["sjd"])
    prompt = given["prompt"]
    if "prompt_embeds" in prompt:
        prompt["prompt_embeds"] = torch.tensor(prompt["prompt_embeds"])
    output = llm.generate([prompt], [params], use_tqdm=False)[0]
    print("TOKENS", json.dumps(list(output.outputs[0].token_ids)))

if __name__ == "__main__":
    main()
"""


def check_two_ranks(
    model: Path, family: ImageFamily, size: ImageSize, prompt: str, expected: list[int], guidance_scale: float = 3.0
) -> None:
    """The same greedy picture from tensor parallel 2, in processes of its own; `expected` as tensor parallel 1 gave."""
    cond = family.prompt_token_ids(prompt, size)
    given_prompt = engine_prompt(family, size, prompt)
    if "prompt_embeds" in given_prompt:
        given_prompt["prompt_embeds"] = given_prompt["prompt_embeds"].tolist()
    given = {
        "model": str(model),
        "engine_args": {},
        "num_tokens": family.grammar(size).num_tokens,
        "prompt": given_prompt,
        "sjd": guided(guidance_scale, family.unconditional_token_ids(cond, size), image_size=str(size)),
    }
    script = model.parent / "two_ranks.py"  # a file: vLLM's workers are spawned, and import it anew
    script.write_text(_TWO_RANKS)
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=540,
        env={**_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("TOKENS ")) == expected


def _environment() -> dict[str, str]:
    here = str(Path(__file__).parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
