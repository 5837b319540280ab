"""Decoding under fixed noise: its law by enumeration, choices against a plain rendering, the promises of a sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.gumbel_race import TRIANGLE, Polygon, key_of, where_wins, win_probs
from core.toy_model import ToyModel
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from sjd_kernels.sweep_cpu import sweep_cpu
from sjd_vllm.core import gumbel_choices, process_target, sweep
from sjd_vllm.core.randomness import gumbel_noise

ROUNDING = 1e-12
Sweep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def compiled_sweep(*tensors: Tensor) -> Tensor:
    """What the engine runs on a CPU in place of the core's."""
    return torch.from_numpy(sweep_cpu(*(tensor.numpy() for tensor in tensors)))


SWEEPS = pytest.mark.parametrize("sweeping", [sweep, compiled_sweep], ids=["core", "compiled"])
Noise = dict[int, Polygon]


def emitted_joint(
    model: ToyModel,
    window: int,
    first_drafts: list[int],
    sweeping: Sweep = sweep,
    *,
    is_noise_shared: bool = False,
    surplus: int = 0,
) -> Tensor:
    """The joint [V ** num_tokens] of what sweeps emit: every outcome of the noise is followed with its probability.

    Two ways to be wrong, for the controls:
    is_noise_shared: all positions have the noise of the first (BIASED).
    surplus: so many choices more than are final are emitted, though their prefix was wrong (BIASED).
    """
    # (final tokens, drafts, what is known of the noise) -> weight
    states: dict[Any, tuple[float, int, list[int], Noise]] = {(): (1.0, 0, first_drafts, {})}
    joint = torch.zeros(model.num_sequences, dtype=torch.float64)
    while states:
        following: dict[Any, tuple[float, int, list[int], Noise]] = {}
        for weight, position, drafts, noise in states.values():
            num_rows = min(window + 1, model.num_tokens - position)
            for probability, choices, known in _all_choices(model, drafts, position, num_rows, noise, is_noise_shared):
                tokens = torch.tensor([drafts])
                rows = torch.zeros(num_rows, dtype=torch.long)
                final = sweeping(tokens, rows, position + torch.arange(num_rows), torch.tensor(choices), rows[:1])
                at, new = position + min(int(final) + surplus, num_rows), tokens[0].tolist()
                if at == model.num_tokens:
                    joint[model.sequence_index(tokens)] += weight * probability
                    continue
                # noise left of the first open position will not be asked again
                open_noise = {p: polygon for p, polygon in known.items() if p >= at or is_noise_shared}
                key = (at, *new, *((p, key_of(polygon)) for p, polygon in sorted(open_noise.items())))
                before = following[key][0] if key in following else 0.0
                following[key] = (before + weight * probability, at, new, open_noise)
        states = following
    return joint


def _all_choices(
    model: ToyModel, drafts: list[int], position: int, num_rows: int, noise: Noise, is_noise_shared: bool
) -> list[tuple[float, list[int], Noise]]:
    """Each joint outcome of the noise at the scored positions: its probability, the choices, and what is then known."""
    probs = model.probs_along(torch.tensor([drafts]))[0, position : position + num_rows].tolist()
    outcomes: list[tuple[float, list[int], Noise]] = [(1.0, [], noise)]
    for slot, row in enumerate(probs):
        place = 0 if is_noise_shared else position + slot
        outcomes = [
            (weight * chance, [*choices, column], {**known, place: where_wins(known.get(place, TRIANGLE), row, column)})
            for weight, choices, known in outcomes
            for column, chance in enumerate(win_probs(known.get(place, TRIANGLE), row))
            if chance > 1e-15
        ]
    return outcomes


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 2.5},
    "guided, cold, top_k": {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 2},
}


@SWEEPS
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("window", [0, 1, 2, 3])
def test_the_joint_is_that_of_ordinary_sampling(window: int, kind: str, sweeping: Sweep) -> None:
    model = ToyModel.random(7, num_tokens=4 if window == 3 else 5, **DISTRIBUTIONS[kind])
    for first_drafts in ([0, 0, 0, 0, 0][: model.num_tokens], [2, 0, 1, 1, 2][: model.num_tokens]):
        joint = emitted_joint(model, window, first_drafts, sweeping)
        assert float((joint - model.joint()).abs().sum() / 2) < ROUNDING


@pytest.mark.parametrize("wrong", [{"is_noise_shared": True}, {"surplus": 1}])
def test_what_is_wrong_shows(wrong: dict[str, Any]) -> None:
    model = ToyModel.random(7, num_tokens=4)
    joint = emitted_joint(model, 2, [0] * 4, **wrong)
    assert float((joint - model.joint()).abs().sum() / 2) > 0.03


def plainly_chosen(logits: Tensor, token_ids: Tensor, seeds: Tensor, positions: Tensor, **processing: Any) -> Tensor:
    """argmax(log p + g) over all columns, with p by `process_target`."""
    if "uncond_logits" in processing:
        processing["uncond_logits"] = processing["uncond_logits"][:, None]
    probs = process_target(logits[:, None], **processing)[:, 0]
    return token_ids[(probs.log() + gumbel_noise(seeds, positions, token_ids, logits.dtype)).argmax(-1)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_columns=st.integers(1, 70),
    top_k=st.sampled_from([None, 1, 3, 64, "rows"]),
    top_p=st.booleans(),
    is_guided=st.booleans(),
    temperature=st.sampled_from([None, "warm", "mixed"]),
    is_coarse=st.booleans(),
)
def test_choices_are_those_of_the_target_distribution(
    seed: int,
    num_columns: int,
    top_k: Any,
    top_p: bool,
    is_guided: bool,
    temperature: str | None,
    is_coarse: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_rows = 5
    logits, uncond = 3 * torch.randn(2, num_rows, num_columns, generator=generator, dtype=torch.float64)
    if is_coarse:  # many equal logits, as in bfloat16
        logits, uncond = logits.round(), uncond.round()
    processing: dict[str, Any] = {}
    if is_guided:
        processing |= {"uncond_logits": uncond, "guidance_scale": torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0])}
    if temperature is not None:
        coldest = 0.0 if temperature == "mixed" else 0.5
        processing["temperature"] = torch.tensor([1.0, coldest, 0.7, coldest, 2.0])
    if top_k is not None:
        processing["top_k"] = torch.tensor([0, 2, 5, 64, 1]) if top_k == "rows" else top_k
    if top_p:
        processing["top_p"] = torch.tensor([1.0, 0.5, 0.9, 0.2, 1.0], dtype=torch.float64)
    token_ids = torch.arange(num_columns) * 3 + 100
    key = {"seeds": torch.randint(2**62, (num_rows,), generator=generator), "positions": torch.arange(num_rows) + 9}
    chosen = gumbel_choices(logits, token_ids, **key, **processing)
    assert chosen.tolist() == plainly_chosen(logits, token_ids, **key, **processing).tolist()


@pytest.mark.parametrize("top_k", [None, 3])
def test_choices_follow_the_distribution(top_k: int | None) -> None:
    num = 60_000
    logits = torch.tensor([0.3, 1.5, -0.5, 0.2, 2.0])
    expected = process_target(logits[None, None], top_k=top_k)[0, 0].double() * num
    chosen = gumbel_choices(
        logits.expand(num, 5), torch.arange(5), seeds=torch.arange(num), positions=torch.full((num,), 4), top_k=top_k
    )
    counts = chosen.bincount(minlength=5).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi2.sf(float(statistic), int(possible.sum()) - 1) > 1e-4
    # the same counts must not pass for a slightly different distribution
    wrong = process_target((logits * 1.05)[None, None], top_k=top_k)[0, 0].double()[possible] * num
    assert chi2.sf(float(((counts[possible] - wrong) ** 2 / wrong).sum()), int(possible.sum()) - 1) < 1e-4


@pytest.mark.parametrize("processing", [{}, {"top_k": 2}, {"temperature": torch.zeros(2)}])
def test_a_row_that_is_no_distribution_has_no_choice(processing: dict[str, Any]) -> None:
    logits = torch.tensor([[torch.nan, 1.0, 2.0], [-torch.inf] * 3])
    key = {"seeds": torch.zeros(2).long(), "positions": torch.zeros(2).long()}
    assert gumbel_choices(logits, torch.arange(3), **key, **processing).tolist() == [-1, -1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_sweep_keeps_its_promises(seed: int, num_requests: int) -> None:
    """A choice is final if all drafts before it were the choices; every scored draft is replaced; the rest stays."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 9
    drafts = torch.randint(2, (num_requests + 1, num_tokens), generator=generator)
    old, held = drafts.clone(), torch.randperm(num_requests + 1, generator=generator)[:num_requests]
    first = torch.randint(num_tokens, (num_requests,), generator=generator)
    num_rows = 1 + (torch.rand(num_requests, generator=generator) * (num_tokens - first)).long()
    starts = num_rows.cumsum(0) - num_rows
    rows = held.repeat_interleave(num_rows)
    positions = torch.cat([at + torch.arange(n) for at, n in zip(first.tolist(), num_rows.tolist(), strict=True)])
    choices = torch.randint(-1, 2, (len(rows),), generator=generator)
    num_final = sweep(drafts, rows, positions, choices, starts).tolist()
    touched: dict[int, set[int]] = defaultdict(set)
    for request, (row, at, start) in enumerate(zip(held.tolist(), first.tolist(), starts.tolist(), strict=True)):
        own = choices[start : start + int(num_rows[request])].tolist()
        expected = 1
        while expected < len(own) and old[row, at + expected - 1] == own[expected - 1]:
            expected += 1
        assert num_final[request] == expected
        for offset, choice in enumerate(own):
            assert drafts[row, at + offset] == (choice if choice >= 0 else old[row, at + offset])
            touched[row].add(at + offset)
    for row in range(num_requests + 1):
        rest = [position for position in range(num_tokens) if position not in touched[row]]
        assert torch.equal(drafts[row, rest], old[row, rest])
