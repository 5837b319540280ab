"""The target pipeline against a slow, obvious one, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sjd_vllm.core import process_target, validate_legal

NUM_COLUMNS = 7


def obvious(
    cond: np.ndarray, uncond: np.ndarray, scale: float, legal: np.ndarray, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """One slot, in the order of the documentation."""
    logits = cond if scale == 1 else uncond + scale * (cond - uncond)
    order = sorted(np.flatnonzero(legal), key=lambda column: (-logits[column], column))
    if temperature == 0:
        order = order[:1]
    weights = np.exp((logits - logits[order[0]]) / (temperature or 1))
    if top_k > 0:
        order = order[:top_k]
    mass = weights[order] / weights[order].sum()
    order = [column for column, before in zip(order, mass.cumsum() - mass, strict=True) if before < top_p or top_p >= 1]
    probs = np.zeros_like(logits)
    probs[order] = weights[order] / weights[order].sum()
    return probs


# few different values, so that ties are common
logit_rows = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=NUM_COLUMNS, max_size=NUM_COLUMNS)
rows = st.tuples(
    logit_rows,
    logit_rows,
    st.sampled_from([0.0, 1.0, 2.5]),
    st.lists(st.booleans(), min_size=NUM_COLUMNS, max_size=NUM_COLUMNS).filter(any),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.integers(-1, NUM_COLUMNS + 1),
    st.sampled_from([0.15, 0.55, 0.93, 1.0]),
)


@settings(max_examples=200, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=4))
def test_pipeline_in_the_documented_order(batch: list[tuple[object, ...]]) -> None:
    columns = [np.array(column) for column in zip(*batch, strict=True)]
    cond, uncond, scale, legal, temperature, top_k, top_p = (torch.from_numpy(column) for column in columns)
    probs = process_target(
        cond[:, None],
        uncond_logits=uncond[:, None],
        guidance_scale=scale,
        legal=legal[:, None],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )[:, 0]
    expected = np.stack([obvious(*row) for row in zip(*columns, strict=True)])
    np.testing.assert_allclose(probs.numpy(), expected, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(batch=st.lists(st.tuples(logit_rows, st.integers(1, NUM_COLUMNS)), min_size=1, max_size=5))
def test_top_k_keeps_exactly_k_and_the_lowest_columns_of_equals(batch: list[tuple[list[float], int]]) -> None:
    logits = torch.tensor([row for row, _ in batch])[:, None]
    top_k = torch.tensor([k for _, k in batch])
    probs = process_target(logits, top_k=top_k)
    assert ((probs > 0).sum(-1)[:, 0] == top_k).all()
    bounded = process_target(logits, top_k=top_k, max_top_k=NUM_COLUMNS - 1 if top_k.max() < NUM_COLUMNS else None)
    assert torch.equal(probs, bounded)
    for row, (values, k) in enumerate(batch):
        best = sorted(range(NUM_COLUMNS), key=lambda column: (-values[column], column))[:k]
        assert probs[row, 0].nonzero()[:, 0].tolist() == sorted(best)
        assert torch.equal(process_target(logits[row : row + 1], top_k=k), probs[row : row + 1])


@pytest.mark.parametrize("top_k", [0, -1, NUM_COLUMNS, 100])
def test_top_k_off_beside_a_row_where_it_is_on(top_k: int) -> None:
    logits = torch.randn(2, 3, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))
    plain = process_target(logits)
    probs = process_target(logits, top_k=torch.tensor([top_k, 2]), max_top_k=2)
    assert torch.equal(probs[0], plain[0])
    assert (probs[1] > 0).sum(-1).tolist() == [2, 2, 2]
    assert torch.equal(process_target(logits, top_k=top_k), plain)


def test_scale_one_is_exactly_the_conditional_row() -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (30 * torch.randn(2, 4, 300, generator=generator) for _ in range(2))
    probs = process_target(cond, uncond_logits=uncond, guidance_scale=torch.tensor([1.0, 4.0]))
    assert torch.equal(probs[0], process_target(cond)[0])
    assert not torch.equal(probs[1], process_target(cond)[1])


def test_columns_that_the_model_forbids_stay_forbidden_under_guidance() -> None:
    cond = torch.tensor([[[0.0, -torch.inf, 1.0]]])
    uncond = torch.tensor([[[1.0, -torch.inf, 0.0]]])
    probs = process_target(cond, uncond_logits=uncond, guidance_scale=torch.tensor([3.0]))
    assert probs[0, 0, 1] == 0
    assert probs.sum() == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0.0, 1e-44, 1e-9])
def test_cold_rows_are_one_hot(temperature: float) -> None:
    logits = torch.tensor([[[1.0, 7.5, -300.0, 7.25]]])
    probs = process_target(logits, temperature=torch.tensor([temperature]), top_k=torch.tensor([3]))
    assert probs.tolist() == [[[0.0, 1.0, 0.0, 0.0]]]


def test_a_slot_without_legal_columns_has_no_mass() -> None:
    legal = torch.tensor([[[True, False, True], [False, False, False]]])
    for processing in ({}, {"temperature": torch.zeros(1)}, {"top_k": 2}, {"top_p": torch.tensor([0.5])}):
        probs = process_target(torch.zeros(1, 2, 3), legal=legal, **processing)
        assert probs[0, 1].tolist() == [0.0, 0.0, 0.0]
        assert probs[0, 0].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "processing",
    [
        {},
        {"temperature": torch.tensor([0.0, 0.5])},
        {"top_k": 2},
        {"top_k": torch.tensor([2, 3])},
        {"top_k": torch.tensor([2, 0]), "max_top_k": 2},
        {"top_p": torch.tensor([0.5, 0.9])},
        {"temperature": torch.tensor([2.0, 0.0]), "top_k": torch.tensor([1, 2]), "top_p": torch.tensor([0.9, 1.0])},
    ],
)
def test_nan_in_a_legal_column_shows_and_stays_in_its_slot(processing: dict[str, Any]) -> None:
    logits = torch.randn(2, 3, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))
    legal = torch.ones(2, 3, NUM_COLUMNS, dtype=torch.bool)
    legal[:, :, 4] = False
    sound = process_target(logits, legal=legal, **processing)
    poisoned = logits.clone()
    poisoned[:, 1, 2] = torch.nan
    poisoned[:, 2, 4] = torch.nan  # not legal, so nobody asks
    probs = process_target(poisoned, legal=legal, **processing)
    assert probs[:, 1].isnan().all()
    assert torch.equal(probs[:, ::2], sound[:, ::2])


def test_validate_legal_names_the_slot() -> None:
    legal = torch.ones(2, 3, 4, dtype=torch.bool)
    validate_legal(legal)
    legal[1, 2] = False
    with pytest.raises(ValueError, match="request 1 at slot 2"):
        validate_legal(legal)
    validate_legal(legal, lengths=torch.tensor([3, 2]))


def test_guidance_needs_both_halves() -> None:
    with pytest.raises(ValueError, match="belong together"):
        process_target(torch.zeros(1, 1, 2), guidance_scale=torch.ones(1))
