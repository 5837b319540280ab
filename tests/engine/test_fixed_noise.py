"""Under fixed noise the engine's sampled tokens are those of plain decoding with the same noise, one by one.

The reference asks Transformers for the logits of each prefix from scratch and takes the choice of the noise: no window,
no draft, no batch, no cache. What the engine does with windows, load, chunks and preemption must not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Engine, Reference, engine, guided, record_preemptions, sampling, scaled

from sjd_vllm.core import gumbel_choices
from sjd_vllm.engine.window_control import WindowController

PROMPTS = [[1, 2, 3], [7, 8, 9] * 15, [5]]
SETTINGS: list[dict[str, Any]] = [
    {"sjd": None},
    {"sjd": guided(3.0, [1, 9]), "top_k": 12},
    {"sjd": guided(2.0, [4] * 50), "top_k": 5, "top_p": 0.9, "temperature": 0.8},
    {"sjd": guided(0.5, [4, 6]), "allowed_token_ids": list(range(2, 60, 3))},
]
NUM_TOKENS = scaled(120, 36)
CASES = [(prompt, settings, 100 + n) for n, (prompt, settings) in enumerate((p, s) for p in PROMPTS for s in SETTINGS)]


def plain(reference: Reference, prompt: list[int], settings: dict[str, Any], seed: int) -> list[int]:
    """One token at a time."""
    ids = torch.tensor(settings.get("allowed_token_ids", range(64)))
    tokens: list[int] = []
    for position in range(NUM_TOKENS):
        choice = gumbel_choices(
            reference.mixed_logits(prompt, settings["sjd"], [tokens])[:, ids],
            ids,
            seeds=torch.tensor([seed]),
            positions=torch.tensor([position]),
            temperature=torch.tensor([settings.get("temperature", 1.0)]),
            top_k=settings.get("top_k"),
            top_p=torch.tensor([settings["top_p"]]) if "top_p" in settings else None,
        )
        tokens.append(int(choice))
    return tokens


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return [plain(reference, *case) for case in CASES]


@pytest.fixture(scope="module")
def roomy(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, window=60) as running:
        yield running


def generated(running: Engine, windows: list[int | None]) -> list[list[int]]:
    """All cases in one batch; None leaves the window to the engine."""
    params = []
    for n, (_, settings, seed) in enumerate(CASES):
        window = windows[n % len(windows)]
        sjd = {**(settings["sjd"] or {}), **({} if window is None else {"num_speculative_tokens": window})}
        params.append(sampling(NUM_TOKENS, seed=seed, **{**settings, "sjd": sjd}))
    outputs = running.generate([prompt for prompt, _, _ in CASES], params)
    running.assert_nothing_left()
    return [tokens for (tokens,) in outputs]


@pytest.mark.parametrize("windows", scaled([[0], [1], [16], [60], [None], [0, None, 60, 3]], [[0, None, 60, 3]]))
def test_windows_do_not_show(roomy: Engine, expected: list[list[int]], windows: list[int | None]) -> None:
    assert generated(roomy, windows) == expected


def test_windows_that_follow_the_load_do_not_show(
    roomy: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widest swings that a controller could make, from step to step."""
    chosen = iter([0, 60, 1, 7, 0, 0, 33, 60, 2] * 1000)
    monkeypatch.setattr(WindowController, "choose", lambda self, **load: next(chosen))
    assert generated(roomy, [None]) == expected


def test_a_window_of_first_guesses_tells_nothing(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller hears of a window as settled once all its drafts came in at its end, and of the others apart."""
    told: list[list[tuple[int, int]]] = []
    others: list[list[tuple[int, int]]] = []

    def observe(self: WindowController, drafts: list[tuple[int, int]], just_opened: list[tuple[int, int]]) -> None:
        told.append(list(drafts))
        others.append(list(just_opened))

    chosen = iter([8] * 12 + [0] * 2 + [8] * 1000)
    monkeypatch.setattr(WindowController, "choose", lambda self, **load: next(chosen))
    monkeypatch.setattr(WindowController, "observe_acceptance", observe)
    prompt, settings, seed = CASES[1]
    roomy.generate([prompt], [sampling(80, seed=seed, **settings)])
    # the first step is the prompt's; from then on each gives at least one token
    settled = [bool(drafts) for drafts in told]
    assert not any(settled[:3])
    assert any(settled[3:12])
    assert not any(settled[12:15])
    assert any(settled[15:])
    assert {window for step in told for window, _ in step} <= set(range(1, 9))
    assert others[1]
    assert not any(drafts and just_opened for drafts, just_opened in zip(told, others, strict=True))


def test_chunks_cut_windows_and_preemption_do_not_show(
    tiny_llama: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {
        "block_size": 32,
        "num_gpu_blocks_override": scaled(22, 14),
        "max_model_len": scaled(512, 256),
        "max_num_batched_tokens": 64,
        "max_num_seqs": 13,
    }
    with engine(tiny_llama, window=20, **limits) as small:
        preempted = record_preemptions(small, monkeypatch)
        assert generated(small, [None, 20]) == expected
        assert preempted
