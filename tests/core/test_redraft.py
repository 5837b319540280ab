"""Names, thresholds, and how many drafts each refresh keeps."""

from __future__ import annotations

import pytest
import torch

from sjd_vllm.core import (
    FIRST_GUESS_NAMES,
    REDRAFT_NAMES,
    CounterNoise,
    DraftWindow,
    get_first_guess,
    get_redraft,
)


def kept_share(name: str, target: list[float], draft: list[float]) -> float:
    """The share of drafts, drawn from `draft`, that a refresh to `target` leaves as they were."""
    num = 100_000
    q = torch.tensor(draft).expand(num, 1, -1)
    p = torch.tensor(target).expand(num, 2, -1)
    seeds, zeros = torch.arange(num), torch.zeros(num, dtype=torch.long)
    tokens = torch.multinomial(q[:, 0], 1, generator=torch.Generator().manual_seed(0))
    refreshed, _ = get_redraft(name).refresh(
        DraftWindow(tokens, q, zeros + 1),
        p,
        positions=torch.arange(2).expand(num, 2),
        where=torch.ones(num, 2, dtype=torch.bool),
        randomness=CounterNoise(seeds, zeros),
    )
    return float((refreshed[:, :1] == tokens).double().mean())


def test_coupling_keeps_all_that_the_distance_of_the_laws_allows() -> None:
    target, draft = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    assert kept_share("coupled", target, draft) == pytest.approx(1 - 0.3, abs=0.006)
    assert kept_share("resample", target, draft) == pytest.approx(0.1 + 0.09 + 0.1, abs=0.006)


@pytest.mark.parametrize("name", ["coupled", "reuse"])
def test_an_unchanged_law_keeps_every_draft(name: str) -> None:
    assert kept_share(name, [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]) == 1


def test_every_name_is_known_by_its_strategy() -> None:
    for name in REDRAFT_NAMES:
        if name != "reuse_biased":
            assert get_redraft(name).name == name
    for name in FIRST_GUESS_NAMES:
        assert get_first_guess(name).name == name


@pytest.mark.parametrize(("wrong", "nearest"), [("couple", "coupled"), ("resampel", "resample"), ("re-use", "reuse")])
def test_a_misspelt_redraft_gets_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown redraft strategy '{wrong}'; did you mean '{nearest}'"):
        get_redraft(wrong)


def test_a_misspelt_first_guess_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'left_probs'"):
        get_first_guess("left_prob")
    with pytest.raises(ValueError, match="Known: uniform, repeat_left"):
        get_first_guess("xyz")


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_threshold_is_a_ratio(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be a finite number >= 0"):
        get_redraft("reuse", threshold=threshold)


def test_the_biased_rule_says_so() -> None:
    with pytest.warns(UserWarning, match="does not sample from the model"):
        get_redraft("reuse_biased")
