"""The whole law of `jacobi_step` on a toy model: every random choice is enumerated, nothing is sampled.

`Enumerating` stands in for the noise. At the first random call that has no script it raises `Unscripted` with
the probability of every outcome; the driver multiplies its weighted states accordingly and runs the step
again with the longer script, until the step runs through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from core.toy_model import ToyModel
from torch import Tensor

from sjd_vllm.core import Context, DraftWindow, FirstGuess, Purpose, Redraft, StepResult, jacobi_step

NEGLIGIBLE = 1e-15  # options that exist by rounding only


class Unscripted(Exception):  # noqa: N818  (not an error: it carries a question to the driver)
    """A random call whose outcome is not fixed yet."""

    def __init__(self, options: Tensor) -> None:
        super().__init__()
        self.options = options  # [S, slots, outcomes] probabilities


class Enumerating:
    """A `Randomness` that follows a script: one tensor of outcomes [S, slots] for each random call."""

    def __init__(self, script: list[Tensor]) -> None:
        self._script = script
        self._num_calls = 0

    def accept(self, target: Tensor, draft: Tensor, *, purpose: Purpose, positions: Tensor, where: Tensor) -> Tensor:
        yes = torch.where(draft > 0, target / draft, 1.0).clamp(max=1.0)
        return self._choose(torch.stack([1 - yes, yes], -1), where).bool()

    def draw(self, weights: Tensor, *, purpose: Purpose, positions: Tensor, where: Tensor) -> Tensor:
        return self._choose(weights / weights.sum(-1, keepdim=True), where)

    def _choose(self, options: Tensor, where: Tensor) -> Tensor:
        if self._num_calls == len(self._script):
            num_outcomes = options.shape[-1]
            # an unused result must not matter, so let it be the least expected one: accepted, or the last column
            unused = torch.zeros(num_outcomes, dtype=options.dtype)
            unused[-1] = 1
            flat = torch.where(where[..., None], options, unused).reshape(len(where), -1, num_outcomes)
            raise Unscripted(flat)
        outcome = self._script[self._num_calls].reshape(where.shape)
        self._num_calls += 1
        return outcome


@dataclass
class States:
    """Weighted states of the decoder, one a row, each in its own place."""

    weight: Tensor  # [S]
    tokens: Tensor  # [S, num_tokens], -1 where not emitted
    positions: Tensor  # [S]
    window: DraftWindow
    context: Context

    def select(self, rows: Tensor) -> States:
        return States(
            self.weight[rows],
            self.tokens[rows],
            self.positions[rows],
            self.window.select(rows),
            self.context.select(rows),
        )


AfterStep = Callable[[States, Tensor, StepResult], StepResult]


def emitted_joint(
    model: ToyModel,
    *,
    width: int,
    redraft: Redraft,
    first_guess: FirstGuess,
    row_stride: int | None = None,
    window_at: Callable[[Tensor], Tensor] | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """The joint [V ** num_tokens] of what speculative decoding emits.

    window_at: positions [S] -> the longest next window [S]; None: `width` everywhere.
    after_step: (states, target_probs, result) -> result; tampers with a step, for the controls that must fail.
    """
    num_context = min(first_guess.num_context_slots(row_stride), model.num_tokens)
    context_columns = model.num_columns if first_guess.needs_probs else None
    states = States(
        torch.ones(1, dtype=torch.float64),
        torch.full((1, model.num_tokens), -1),
        torch.zeros(1, dtype=torch.long),
        DraftWindow.empty(1, width, model.num_columns, dtype=torch.float64),
        Context.empty(1, num_context, context_columns, dtype=torch.float64),
    )
    joint = torch.zeros(model.num_sequences, dtype=torch.float64)
    while len(states.weight):
        states, result = _all_outcomes(model, states, redraft, first_guess, row_stride, window_at)
        if after_step is not None:
            result = after_step(states, _target_probs(model, states), result)
        row, slot = (result.tokens >= 0).nonzero(as_tuple=True)
        states.tokens[row, states.positions[row] + slot] = result.tokens[row, slot]
        positions = states.positions + result.num_emitted
        window = result.window.truncated((model.num_tokens - positions - 1).clamp(min=0))
        states = replace(states, positions=positions, window=window, context=result.context)

        done = (positions == model.num_tokens).nonzero()[:, 0]
        joint.index_add_(0, model.sequence_index(states.tokens[done]), states.weight[done])
        states = _merged(states.select((positions < model.num_tokens).nonzero()[:, 0]))
    return joint


def total_variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


def _target_probs(model: ToyModel, states: States) -> Tensor:
    """p of the slots 0..W of each state [S, W+1, V]."""
    num_states, width = states.window.tokens.shape
    tokens = torch.cat([states.tokens, torch.zeros(num_states, width, dtype=torch.long)], 1).clamp(min=0)
    slots = states.positions[:, None] + torch.arange(width + 1)
    tokens.scatter_(1, slots[:, :width], states.window.tokens.clamp(min=0))
    index = slots[..., None].expand(-1, -1, model.num_columns)
    return model.probs_along(tokens).gather(1, index)


def _all_outcomes(
    model: ToyModel,
    states: States,
    redraft: Redraft,
    first_guess: FirstGuess,
    row_stride: int | None,
    window_at: Callable[[Tensor], Tensor] | None,
) -> tuple[States, StepResult]:
    """Run the real step on every outcome of its random calls; states are multiplied and weighted."""
    script: list[Tensor] = []
    while True:
        longest = states.window.width if window_at is None else window_at(states.positions)
        try:
            result = jacobi_step(
                _target_probs(model, states),
                states.window,
                positions=states.positions,
                next_lengths=(model.num_tokens - states.positions - 2).clamp(min=0).clamp(max=longest),
                next_width=states.window.width,
                legal_at=model.legal_at,
                context=states.context,
                row_stride=row_stride,
                redraft=redraft,
                first_guess=first_guess,
                randomness=Enumerating(script),
            )
        except Unscripted as call:
            rows, outcome, probability = _expand(call.options)
            states = states.select(rows)
            states.weight = states.weight * probability
            script = [*(known[rows] for known in script), outcome]
        else:
            return states, result


def _expand(options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """options [S, slots, O] -> of each joint outcome: its state [M], its choices [M, slots], its probability [M]."""
    rows = torch.arange(len(options))
    outcome = torch.zeros(len(options), 0, dtype=torch.long)
    probability = torch.ones(len(options), dtype=torch.float64)
    for slot in range(options.shape[1]):
        parent, choice = (options[rows, slot] > NEGLIGIBLE).nonzero(as_tuple=True)
        probability = probability[parent] * options[rows[parent], slot, choice]
        outcome = torch.cat([outcome[parent], choice[:, None]], 1)
        rows = rows[parent]
    return rows, outcome, probability


def _merged(states: States) -> States:
    """Add up the weights of states that behave alike from here on."""
    if not len(states.weight):
        return states
    window, context = states.window, states.context
    is_draft = torch.arange(window.width) < window.lengths[:, None]
    is_known = torch.arange(context.num_slots) >= context.num_slots - context.lengths[:, None]
    parts = [
        states.positions[:, None],
        states.tokens,
        window.lengths[:, None],
        window.tokens.masked_fill(~is_draft, 0),
        window.probs.masked_fill(~is_draft[..., None], 0).flatten(1),
    ]
    if context.probs is not None:
        parts.append(context.probs.masked_fill(~is_known[..., None], 0).flatten(1))
    numbers = torch.cat([part.double() for part in parts], 1).mul(1e11).round().long().numpy()
    _, first, inverse = np.unique(_hash_rows(numbers), return_index=True, return_inverse=True)
    merged = states.select(torch.from_numpy(first))
    merged.weight = torch.zeros(len(first), dtype=torch.float64)
    merged.weight.index_add_(0, torch.from_numpy(inverse), states.weight)
    return merged


def _hash_rows(numbers: np.ndarray) -> np.ndarray:
    factors = np.random.default_rng(0).integers(1, 2**62, size=numbers.shape[1]) | 1
    with np.errstate(over="ignore"):
        mixed = numbers * factors
        return ((mixed ^ (mixed >> 31)) * factors[::-1]).sum(1)
