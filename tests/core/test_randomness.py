"""The noise: uniform, independent along every part of its key, and never pointing at an impossible column."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from sjd_vllm.core import CounterNoise, Purpose, uniform_choice
from sjd_vllm.core.randomness import gumbel_noise

MASK = (1 << 64) - 1
NUM_BINS = 256
UNLIKELY = 1e-4  # p-value of a test with a fixed seed


def uniform_bins(seeds: Tensor, positions: Tensor, iterations: Tensor, purpose: Purpose) -> Tensor:
    """All arguments [R] -> a uniform draw out of NUM_BINS for each."""
    noise = CounterNoise(seeds, iterations)
    weights = torch.ones(1, 1, NUM_BINS).expand(len(seeds), 1, NUM_BINS)
    where = torch.ones(len(seeds), 1, dtype=torch.bool)
    return noise.draw(weights, purpose=purpose, positions=positions[:, None], where=where)[:, 0]


def full_key(num: int, **varied: Tensor) -> dict[str, Tensor]:
    fixed = {"seeds": 11, "positions": 300, "iterations": 40}
    return {name: varied.get(name, torch.full((num,), value)) for name, value in fixed.items()}


def p_value(counts: Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), counts.numel() - 1))


@pytest.mark.parametrize("purpose", [Purpose.ACCEPT, Purpose.CORRECTION, Purpose.KEEP, Purpose.FIRST_GUESS])
@pytest.mark.parametrize("varied", ["seeds", "positions", "iterations"])
def test_uniform_along_each_part_of_the_key(varied: str, purpose: Purpose) -> None:
    num = 40_000
    bins = uniform_bins(**full_key(num, **{varied: torch.arange(num)}), purpose=purpose)
    assert p_value(bins.bincount(minlength=NUM_BINS).double()) > UNLIKELY


@pytest.mark.parametrize("varied", ["seeds", "positions", "iterations"])
@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbours_are_independent(varied: str, lag: int) -> None:
    num = 40_000
    bins = uniform_bins(**full_key(num, **{varied: torch.arange(num)}), purpose=Purpose.REDRAFT)
    pairs = (bins[:-lag] // 16) * 16 + bins[lag:] // 16
    assert p_value(pairs.bincount(minlength=256).double()) > UNLIKELY


def test_purposes_are_independent() -> None:
    num = 40_000
    key = full_key(num, positions=torch.arange(num))
    bins = torch.stack([uniform_bins(**key, purpose=purpose) for purpose in Purpose]).double()
    correlation = torch.corrcoef(bins) - torch.eye(len(Purpose))
    assert float(correlation.abs().max()) * math.sqrt(num) < 4.5


def test_parts_of_the_key_do_not_stand_in_for_each_other() -> None:
    """(seed 1, position 2) must not be (seed 2, position 1), and so on: all numbers of a cube are different."""
    side = torch.arange(24)
    seeds, positions, iterations = (axis.flatten() for axis in torch.meshgrid(side, side, side, indexing="ij"))
    noise = CounterNoise(seeds, iterations)
    numbers = noise._uniform(Purpose.ACCEPT, positions[:, None], torch.float64)
    assert len(numbers.unique()) == numbers.numel()


def test_streams_are_those_of_the_written_definition() -> None:
    """A second implementation in Python integers, so that seeds mean the same on every device and version."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    for seed, position, iteration, purpose in [(0, 0, 0, 0), (-5, 17, 3, 2), (2**62, 4096, 900, 4)]:
        key = mix((seed * gamma + 0x8BB84B93962EACC9) & MASK)
        key = mix((key + iteration * 0xD1B54A32D192ED03) & MASK)
        bits = mix((key + (position * len(Purpose) + purpose) * gamma) & MASK)
        noise = CounterNoise(torch.tensor([seed]), torch.tensor([iteration]))
        number = noise._uniform(Purpose(purpose), torch.tensor([[position]]), torch.float64)
        assert float(number) == pytest.approx((bits & (2**63 - 1)) / 2**63, abs=1e-15)


def test_accept_has_the_probability_of_the_ratio() -> None:
    num = 100_000
    noise = CounterNoise(torch.arange(num), torch.zeros(num, dtype=torch.long))
    positions, where = torch.zeros(num, 3, dtype=torch.long), torch.ones(num, 3, dtype=torch.bool)
    positions += torch.arange(3)
    target, draft = torch.tensor([0.1, 0.3, 0.2]).expand(num, 3), torch.tensor([0.4, 0.3, 0.1]).expand(num, 3)
    accepted = noise.accept(target, draft, purpose=Purpose.ACCEPT, positions=positions, where=where).double().mean(0)
    assert abs(float(accepted[0]) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / num)
    assert accepted[1:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_weights(dtype: torch.dtype) -> None:
    num = 60_000
    weights = torch.tensor([0.0, 3.0, 0.5, 0.0, 1.5, 0.0], dtype=dtype)
    noise = CounterNoise(torch.arange(num), torch.full((num,), 7))
    positions, where = torch.full((num, 1), 5), torch.ones(num, 1, dtype=torch.bool)
    inverse = noise.draw(weights.expand(num, 1, 6), purpose=Purpose.REDRAFT, positions=positions, where=where)
    expected = (weights / weights.sum())[[1, 2, 4]].double() * num
    counts = inverse[:, 0].bincount(minlength=6).double()
    assert counts[[0, 3, 5]].sum() == 0
    assert chi2.sf(float(((counts[[1, 2, 4]] - expected) ** 2 / expected).sum()), 2) > UNLIKELY


class EdgeNoise(CounterNoise):
    """Uniforms at the very ends of their range."""

    def __init__(self, u: float) -> None:
        super().__init__(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        self._u = u

    def _uniform(self, purpose: Purpose, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.full(positions.shape, self._u, dtype=dtype)


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(
        st.one_of(st.just(0.0), st.floats(2.0**-126, 2.0**-10, width=32), st.floats(2.0**-10, 1.0, width=32)),
        min_size=1,
        max_size=40,
    ),
    u=st.sampled_from([0.0, 2.0**-63, 0.5, 1 - 2.0**-23, 1 - 2.0**-24]),
)
def test_zero_weights_are_never_drawn(weights: list[float], u: float) -> None:
    row = torch.tensor(weights, dtype=torch.float32)
    where = torch.ones(1, dtype=torch.bool)
    drawn = EdgeNoise(u).draw(row[None], purpose=Purpose.REDRAFT, positions=torch.zeros(1).long(), where=where)
    if float(row.sum()) > 0:
        assert row[drawn] > 0
    else:
        assert drawn == -1


@pytest.mark.parametrize("row", [[0.0, 0.0], [math.nan, 1.0], [math.nan, math.nan]])
def test_a_row_without_mass_gives_no_token(row: list[float]) -> None:
    noise = CounterNoise(torch.tensor([3]), torch.tensor([0]))
    positions, where = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    weights = torch.tensor([[row]])
    assert noise.draw(weights, purpose=Purpose.CORRECTION, positions=positions, where=where).tolist() == [[-1]]


@pytest.mark.parametrize("varied", ["seeds", "positions", "token_ids"])
def test_gumbel_noise_has_its_law_along_each_part_of_the_key(varied: str) -> None:
    num = 40_000
    key = {"seeds": torch.full((num,), 11), "positions": torch.full((num,), 300), "token_ids": torch.full((num,), 5)}
    key[varied] = torch.arange(num)
    noise = gumbel_noise(key["seeds"], key["positions"], key["token_ids"][:, None], torch.float64)[:, 0]
    uniform = torch.exp(-torch.exp(-noise))  # the distribution function of a Gumbel variable
    assert p_value((uniform * NUM_BINS).long().bincount(minlength=NUM_BINS).double()) > UNLIKELY
    pairs = (uniform[:-1] * 16).long() * 16 + (uniform[1:] * 16).long()
    assert p_value(pairs.bincount(minlength=256).double()) > UNLIKELY


def test_gumbel_noise_belongs_to_the_token_wherever_its_column_stands() -> None:
    seeds, positions, ids = torch.tensor([3, 4]), torch.tensor([7, 7]), torch.tensor([9, 2, 40])
    noise = gumbel_noise(seeds, positions, ids, torch.float32)
    turned = gumbel_noise(seeds, positions, ids.flip(0).expand(2, 3), torch.float32)
    assert torch.equal(noise.flip(1), turned)


def test_uniform_choices_are_uniform_and_in_range() -> None:
    num = 40_000
    seeds, positions = torch.full((num,), 5), torch.arange(num)
    places = uniform_choice(torch.full((num,), 100), seeds=seeds, positions=positions)
    assert p_value(places.bincount(minlength=100).double()) > UNLIKELY
    assert uniform_choice(torch.ones(num, dtype=torch.long), seeds=seeds, positions=positions).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("seeds", "iterations"),
    [(torch.zeros(2), torch.zeros(2).long()), (torch.zeros(2).long(), torch.zeros(3).long())],
)
def test_wrong_keys_are_refused(seeds: Tensor, iterations: Tensor) -> None:
    with pytest.raises(ValueError, match="seeds and iterations"):
        CounterNoise(seeds, iterations)
