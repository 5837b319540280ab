"""What every step keeps, whatever comes in: shapes, legality, laws that sum to one, and rows that do not mix."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sjd_vllm.core import (
    FIRST_GUESS_NAMES,
    Context,
    CounterNoise,
    DraftWindow,
    StepResult,
    get_first_guess,
    get_redraft,
    jacobi_step,
    process_target,
)
from sjd_vllm.core.verify import residual

NUM_COLUMNS = 6  # the last column is the end of a line
ROW_STRIDE = 4
REDRAFTS = ("coupled", "resample", "reuse")


def legal_at(positions: Tensor) -> Tensor:
    is_end = (positions % ROW_STRIDE == ROW_STRIDE - 1)[..., None]
    return (torch.arange(NUM_COLUMNS, device=positions.device) == NUM_COLUMNS - 1) == is_end


@dataclass(frozen=True)
class Case:
    """One ragged batch in the middle of decoding, as consistent as a real one."""

    target_probs: Tensor
    window: DraftWindow
    context: Context
    positions: Tensor
    next_lengths: Tensor
    iterations: Tensor
    next_width: int

    @classmethod
    def random(cls, seed: int, num_requests: int, width: int, next_width: int, num_context: int) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def upto(high: int) -> Tensor:
            return torch.randint(high + 1, (num_requests,), generator=generator)

        def probs_at(positions: Tensor) -> Tensor:
            logits = 2 * torch.randn(*positions.shape, NUM_COLUMNS, generator=generator)
            return process_target(logits, legal=legal_at(positions), top_k=3)

        positions = num_context + upto(9)
        slots = positions[:, None] + torch.arange(width + 1)
        draft_probs = probs_at(slots[:, :width])
        before = positions[:, None] - torch.arange(num_context, 0, -1)
        context_probs = probs_at(before)
        return cls(
            target_probs=probs_at(slots),
            window=DraftWindow(drawn_from(draft_probs, generator), draft_probs, upto(width)),
            context=Context(drawn_from(context_probs, generator), context_probs, upto(num_context)),
            positions=positions,
            next_lengths=upto(next_width),
            iterations=upto(5),
            next_width=next_width,
        )

    def step(self, redraft: str, first_guess: str) -> StepResult:
        return jacobi_step(
            self.target_probs,
            self.window,
            positions=self.positions,
            next_lengths=self.next_lengths,
            next_width=self.next_width,
            legal_at=legal_at,
            context=self.context,
            row_stride=ROW_STRIDE,
            redraft=get_redraft(redraft),
            first_guess=get_first_guess(first_guess),
            randomness=CounterNoise(100 + torch.arange(len(self.positions)), self.iterations),
        )


def drawn_from(probs: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(probs.shape, generator=generator).log().neg()
    return (probs / noise).argmax(-1) if probs.numel() else torch.zeros(probs.shape[:-1], dtype=torch.long)


cases = st.builds(
    Case.random,
    seed=st.integers(0, 10**6),
    num_requests=st.integers(1, 5),
    width=st.integers(0, 6),
    next_width=st.integers(0, 6),
    num_context=st.sampled_from([0, ROW_STRIDE - 1, 6]),
)
every_pair = [(redraft, first_guess) for redraft in REDRAFTS for first_guess in FIRST_GUESS_NAMES]


@settings(max_examples=150, deadline=None)
@given(case=cases, names=st.sampled_from(every_pair))
def test_invariants(case: Case, names: tuple[str, str]) -> None:
    result = case.step(*names)
    slots = torch.arange(case.window.width + 1)
    is_emitted = slots < result.num_emitted[:, None]

    # emitted: the accepted drafts and one more token, each possible under its target
    assert (result.num_accepted <= case.window.lengths).all()
    assert torch.equal(result.num_emitted, result.num_accepted + 1)
    assert torch.equal(result.tokens >= 0, is_emitted)
    is_accepted = slots[:-1] < result.num_accepted[:, None]
    assert torch.equal(result.tokens[:, :-1][is_accepted], case.window.tokens[is_accepted])
    prob = case.target_probs.gather(-1, result.tokens.clamp(min=0)[..., None])[..., 0]
    assert (prob[is_emitted] > 0).all()

    # the next window: laws that sum to one, drafts that their law can produce, all legal
    window = result.window
    assert torch.equal(window.lengths, case.next_lengths)
    next_slots = torch.arange(case.next_width)
    is_draft = next_slots < window.lengths[:, None]
    next_positions = (case.positions + result.num_emitted)[:, None] + next_slots
    assert (window.probs >= 0).all()
    torch.testing.assert_close(window.probs.sum(-1), torch.ones_like(window.probs[..., 0]))
    assert (window.probs.gather(-1, window.tokens[..., None])[..., 0][is_draft] > 0).all()
    assert not window.probs[~legal_at(next_positions)].any()
    is_forced = is_draft & (next_positions % ROW_STRIDE == ROW_STRIDE - 1)
    assert (window.tokens[is_forced] == NUM_COLUMNS - 1).all()

    # the next context: what was there, then what was emitted
    context = result.context
    assert context.num_slots == case.context.num_slots
    for row in range(len(case.positions)):
        known = case.context.tokens[row, case.context.num_slots - int(case.context.lengths[row]) :].tolist()
        known += result.tokens[row][is_emitted[row]].tolist()
        kept = int(context.lengths[row])
        assert kept == min(len(known), context.num_slots)
        assert context.tokens[row, context.num_slots - kept :].tolist() == known[len(known) - kept :]


@settings(max_examples=100, deadline=None)
@given(case=cases, names=st.sampled_from(every_pair))
def test_a_request_does_not_see_its_batch_mates(case: Case, names: tuple[str, str]) -> None:
    """Each ragged row, bit for bit, is what the request gets alone, without padding."""
    together = case.step(*names)
    for row in range(len(case.positions)):
        length = int(case.window.lengths[row])
        one = slice(row, row + 1)
        window = case.window
        alone = jacobi_step(
            case.target_probs[one, : length + 1],
            DraftWindow(window.tokens[one, :length], window.probs[one, :length], window.lengths[one]),
            positions=case.positions[one],
            next_lengths=case.next_lengths[one],
            next_width=int(case.next_lengths[row]),
            legal_at=legal_at,
            context=case.context.select(torch.tensor([row])),
            row_stride=ROW_STRIDE,
            redraft=get_redraft(names[0]),
            first_guess=get_first_guess(names[1]),
            randomness=CounterNoise(torch.tensor([100 + row]), case.iterations[one]),
        )
        num_drafts = int(case.next_lengths[row])
        assert torch.equal(alone.tokens[0], together.tokens[row, : length + 1])
        assert torch.equal(alone.window.tokens[0], together.window.tokens[row, :num_drafts])
        assert torch.equal(alone.window.probs[0], together.window.probs[row, :num_drafts])


@pytest.mark.parametrize("names", every_pair)
def test_padding_does_not_matter(names: tuple[str, str]) -> None:
    case = Case.random(5, 5, 6, 6, 6)
    clean = case.step(*names)
    is_padding = torch.arange(7) > case.window.lengths[:, None]
    is_no_draft = torch.arange(6) >= case.window.lengths[:, None]
    is_unknown = torch.arange(6) < 6 - case.context.lengths[:, None]
    assert is_padding.any() and is_unknown.any()
    assert case.context.probs is not None
    case.target_probs[is_padding] = torch.nan
    case.window.probs[is_no_draft] = torch.nan
    case.window.tokens[is_no_draft] = -1
    case.context.tokens[is_unknown] = -1
    case.context.probs[is_unknown] = torch.nan
    dirty = case.step(*names)
    is_draft = torch.arange(6) < case.next_lengths[:, None]
    assert torch.equal(clean.tokens, dirty.tokens)
    assert torch.equal(clean.window.tokens[is_draft], dirty.window.tokens[is_draft])
    assert torch.equal(clean.window.probs[is_draft], dirty.window.probs[is_draft])


class NoHostReads(TorchDispatchMode):
    """Fails on every operation that must wait for the device: a value read, or a shape that depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")
        assert not any(word in name for word in waits), name
        if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("names", every_pair)
def test_a_step_never_waits_for_the_device(names: tuple[str, str]) -> None:
    case = Case.random(1, 3, 5, 5, 6)
    with NoHostReads():
        case.step(*names)
        logits = torch.randn(3, 6, NUM_COLUMNS)
        process_target(
            logits,
            uncond_logits=logits + 1,
            guidance_scale=torch.full((3,), 2.0),
            legal=legal_at(torch.zeros(3, 6)),
            temperature=torch.ones(3),
            top_k=torch.tensor([1, 2, 3]),
            max_top_k=3,
        )


def test_the_mode_that_looks_for_host_reads_sees_them() -> None:
    for wait in (lambda x: x.item(), lambda x: x[x > 0], lambda x: bool(x > 0)):
        with pytest.raises(AssertionError), NoHostReads():
            wait(torch.ones(1))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), num_columns=st.integers(1, 9))
def test_residual_is_never_negative_and_never_empty(seed: int, num_columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, draft = (3 * torch.randn(2, 4, num_columns, generator=generator)).softmax(-1)
    draft[0] = target[0]
    rest = residual(target, draft)
    assert (rest >= 0).all() and (rest.sum(-1) > 0).all()
    assert torch.equal(rest[0], target[0])
    assert not rest[1:][(draft[1:] >= target[1:]) & (rest[1:] != target[1:])].any()


def test_a_draft_that_its_law_cannot_produce_is_refused() -> None:
    case = Case.random(3, 4, 3, 3, 0)
    window = DraftWindow(case.window.tokens, torch.zeros_like(case.window.probs), torch.full((4,), 3))
    result = Case(**{**vars(case), "window": window}).step("coupled", "uniform")
    assert result.num_accepted.tolist() == [0, 0, 0, 0]
    assert (result.tokens[:, 0] >= 0).all()


def test_a_target_without_mass_emits_no_token() -> None:
    case = Case.random(3, 2, 3, 3, 0)
    assert case.step("coupled", "uniform").tokens.amin() >= -1
    result = Case(**{**vars(case), "target_probs": torch.zeros_like(case.target_probs)}).step("coupled", "uniform")
    assert result.tokens.amax() == -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_probs": torch.rand(2, 3, NUM_COLUMNS)}, r"target_probs must be \[R, W\+1, V\]"),
        ({"target_probs": torch.rand(2, 4, NUM_COLUMNS).double()}, "must agree"),
        ({"positions": torch.zeros(2)}, "positions must be int64"),
        ({"next_lengths": torch.zeros(2)}, "next_lengths must be int64"),
        ({"next_width": -1}, "next_width must be >= 0"),
        ({"context": Context.empty(2, 4)}, "needs the distributions of the context"),
    ],
)
def test_wrong_shapes_are_explained(change: dict[str, object], message: str) -> None:
    case = Case.random(3, 2, 3, 3, 0)
    with pytest.raises(ValueError, match=message):
        Case(**{**vars(case), **change}).step("coupled", "left_probs")
