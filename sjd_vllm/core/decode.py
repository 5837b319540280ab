"""Speculative Jacobi decoding of any next-token function: the executable specification, and a public check.

It runs the same `gumbel_choices` and `sweep`, or `process_target` and `jacobi_step`, as an engine does, around a
function of the prefix in place of a model, so its samples can be compared with a distribution that is known.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .first_guess import FirstGuess, get_first_guess
from .fixed_noise import gumbel_choices, sweep
from .prefix_guess import PrefixFunction, PrefixGuess
from .randomness import CounterNoise, uniform_choice
from .redraft import Redraft, get_redraft
from .step import jacobi_step
from .target import process_target
from .window import Context, DraftWindow

LogitsFunction = Callable[[list[list[int]]], Tensor]
GUMBEL = "gumbel"


@dataclass(frozen=True)
class DecodeResult:
    """Finished sequences and how they came about."""

    token_ids: Tensor  # [num_sequences, num_tokens] long
    num_steps: Tensor  # [num_sequences] long: calls of the model that each sequence took part in
    accepted_per_step: list[list[int]]  # drafts accepted in each step; sum + num_steps == num_tokens


def decode(
    next_token_logits: LogitsFunction,
    num_tokens: int,
    *,
    window: int,
    seed: int,
    redraft: str | Redraft = GUMBEL,
    first_guess: str | FirstGuess | PrefixFunction = "uniform",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    allowed_token_ids: Sequence[int] | None = None,
    uncond_logits: LogitsFunction | None = None,
    guidance_scale: float = 1.0,
    num_sequences: int = 1,
    row_stride: int | None = None,
) -> DecodeResult:
    """Draw `num_sequences` sequences of `num_tokens` tokens, exactly as one token at a time would.

    next_token_logits: prefixes (lists of generated tokens, [] at the start) -> raw logits
        [len(prefixes), V]. It must be a function of the prefix; equal prefixes are asked for once a step.
    window: drafts scored at once; 0 is plain sampling.
    seed: sequence i uses seed + i and depends on nothing else, so it equals sequence 0 of seed + i.
    redraft: a name (gumbel, coupled, resample, reuse, reuse_biased) or a strategy.
    first_guess: a name (uniform, repeat_left, repeat_above, left_probs, above_probs), a strategy, or a
        function of the prefix (committed tokens and drafts left of the slot) that returns draft
        probabilities [V] or one token id. With gumbel it is uniform.
    temperature, top_k, top_p: as in `process_target`; top_k 0 or -1 and top_p 1 are off.
    allowed_token_ids: the legal tokens at every position; None: all.
    uncond_logits, guidance_scale: a second function of the prefix and the guidance scale.
    row_stride: tokens of an image row, for the `*_above` first guesses.

    Raises ValueError for arguments or logits that make no sense.
    """
    num_tokens = _whole("num_tokens", num_tokens, at_least=1)
    window = _whole("window", window, at_least=0)
    num_sequences = _whole("num_sequences", num_sequences, at_least=1)
    top_k = _whole("top_k", top_k, at_least=-1)
    seed = _checked_seed(seed, num_sequences)
    _check_sampling(temperature, top_p, guidance_scale, uncond_logits is not None)
    if row_stride is not None:
        row_stride = _whole("row_stride", row_stride, at_least=1)
    model = _Model(next_token_logits, uncond_logits, guidance_scale, temperature, top_k, top_p, allowed_token_ids)
    if redraft == GUMBEL:
        if first_guess != "uniform":
            raise ValueError(f"gumbel makes its first drafts uniform; got first_guess {first_guess!r}")
        return _decode_with_fixed_noise(model, num_tokens, window, seed, num_sequences)
    redraft = get_redraft(redraft) if isinstance(redraft, str) else redraft
    if not isinstance(redraft, Redraft):
        raise ValueError(f"redraft must be a name or a Redraft, got {redraft!r}")
    first_guess = _as_first_guess(first_guess, num_tokens)
    return _decode_by_rejection(model, num_tokens, window, seed, num_sequences, redraft, first_guess, row_stride)


def _decode_with_fixed_noise(
    model: _Model, num_tokens: int, window: int, seed: int, num_sequences: int
) -> DecodeResult:
    model.inspect()
    seeds = seed + torch.arange(num_sequences)
    legal = model.legal_ids
    every = torch.arange(num_tokens).expand(num_sequences, -1)
    counts = torch.full_like(every, len(legal))
    drafts = legal[uniform_choice(counts, seeds=seeds[:, None].expand_as(every), positions=every)]
    accepted_per_step: list[list[int]] = [[] for _ in range(num_sequences)]

    live = torch.arange(num_sequences)  # sequences that still need tokens
    positions = torch.zeros(num_sequences, dtype=torch.long)
    while len(live):
        num_rows = (num_tokens - positions[live]).clamp(max=window + 1)
        starts = num_rows.cumsum(0) - num_rows
        rows = live.repeat_interleave(num_rows)
        row_positions = positions[rows] + torch.arange(len(rows)) - starts.repeat_interleave(num_rows)
        prefixes = [drafts[row, :end].tolist() for row, end in zip(rows.tolist(), row_positions.tolist(), strict=True)]
        num_final = sweep(drafts, rows, row_positions, model.choices(prefixes, seeds[rows], row_positions), starts)
        for sequence, count in zip(live.tolist(), num_final.tolist(), strict=True):
            accepted_per_step[sequence].append(count - 1)
        positions[live] += num_final
        live = (positions < num_tokens).nonzero()[:, 0]
    num_steps = torch.tensor([len(accepted) for accepted in accepted_per_step])
    return DecodeResult(drafts, num_steps, accepted_per_step)


def _decode_by_rejection(
    model: _Model,
    num_tokens: int,
    window: int,
    seed: int,
    num_sequences: int,
    redraft: Redraft,
    first_guess: FirstGuess,
    row_stride: int | None,
) -> DecodeResult:
    token_ids = torch.full((num_sequences, num_tokens), -1, dtype=torch.long)
    num_steps = torch.zeros(num_sequences, dtype=torch.long)
    accepted_per_step: list[list[int]] = [[] for _ in range(num_sequences)]

    live = torch.arange(num_sequences)  # sequences that still need tokens
    positions = torch.zeros(num_sequences, dtype=torch.long)
    num_columns, dtype = model.inspect()
    drafts = DraftWindow.empty(num_sequences, 0, num_columns, dtype=dtype)
    context = Context.empty(
        num_sequences,
        min(first_guess.num_context_slots(row_stride), num_tokens),
        num_columns if first_guess.needs_probs else None,
        dtype=dtype,
    )
    while len(live):
        result = jacobi_step(
            model.target_probs(token_ids[live], positions, drafts),
            drafts,
            positions=positions,
            next_lengths=(num_tokens - positions - 2).clamp(0, window),
            next_width=min(window, num_tokens - 1),
            legal_at=model.legal_at,
            context=context,
            row_stride=row_stride,
            redraft=redraft,
            first_guess=first_guess,
            randomness=CounterNoise(seed + live, num_steps[live]),
        )
        _write(token_ids, live, positions, result.tokens)
        num_steps[live] += 1
        for sequence, num_accepted in zip(live.tolist(), result.num_accepted.tolist(), strict=True):
            accepted_per_step[sequence].append(num_accepted)

        positions = positions + result.num_emitted
        going_on = (positions < num_tokens).nonzero()[:, 0]
        live, positions = live[going_on], positions[going_on]
        # a window ends one token before the end: the last token of a step is never a draft
        drafts = result.window.select(going_on).truncated(num_tokens - positions - 1)
        context = result.context.select(going_on)
    return DecodeResult(token_ids, num_steps, accepted_per_step)


class _Model:
    """The target distributions of a whole batch of windows, from functions of one prefix."""

    def __init__(
        self,
        next_token_logits: LogitsFunction,
        uncond_logits: LogitsFunction | None,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
        allowed_token_ids: Sequence[int] | None,
    ) -> None:
        self._cond = next_token_logits
        self._uncond = uncond_logits
        self._guidance_scale = guidance_scale
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._allowed = allowed_token_ids
        self._legal: Tensor | None = None
        self._num_columns: int | None = None

    def inspect(self) -> tuple[int, torch.dtype]:
        """Ask for the empty prefix once, to learn V and the dtype to compute in."""
        logits = self._ask(self._cond, "next_token_logits", [[]])
        self._num_columns = logits.shape[1]
        if self._allowed is not None:
            self._legal = _legal_columns(self._allowed, self._num_columns)
        return self._num_columns, logits.dtype

    @property
    def legal_ids(self) -> Tensor:
        """The legal tokens, long, ascending."""
        assert self._num_columns is not None
        return torch.arange(self._num_columns) if self._legal is None else self._legal.nonzero()[:, 0]

    def choices(self, prefixes: list[list[int]], seeds: Tensor, positions: Tensor) -> Tensor:
        """What the noise of `seeds` and `positions` [N] picks after each prefix -> long [N]."""
        index_of: dict[tuple[int, ...], int] = {}
        index = [index_of.setdefault(tuple(prefix), len(index_of)) for prefix in prefixes]
        known = [list(prefix) for prefix in index_of]
        legal = self.legal_ids
        logits = self._ask(self._cond, "next_token_logits", known)[:, legal][index]
        uncond, scale = None, None
        if self._uncond is not None:
            uncond = self._ask(self._uncond, "uncond_logits", known).to(logits.dtype)[:, legal][index]
            scale = torch.full((len(index),), self._guidance_scale, dtype=torch.float64)
        chosen = gumbel_choices(
            logits,
            legal,
            seeds=seeds,
            positions=positions,
            uncond_logits=uncond,
            guidance_scale=scale,
            temperature=torch.full((len(index),), self._temperature, dtype=torch.float64),
            top_k=self._top_k if self._top_k > 0 else None,
            top_p=torch.full((len(index),), self._top_p, dtype=torch.float64) if self._top_p < 1 else None,
        )
        if bool((chosen < 0).any()):
            raise ValueError("next_token_logits left no allowed token with a finite logit after some prefix")
        return chosen

    def legal_at(self, positions: Tensor) -> Tensor | None:
        """Legal columns [R, N, V] of any positions [R, N]: the same everywhere."""
        return None if self._legal is None else self._legal.expand(*positions.shape, -1)

    def target_probs(self, token_ids: Tensor, positions: Tensor, drafts: DraftWindow) -> Tensor:
        """token_ids [R, num_tokens], positions [R] of slot 0 -> p [R, W+1, V]."""
        index_of: dict[tuple[int, ...], int] = {}
        rows = zip(token_ids.tolist(), positions.tolist(), drafts.tokens.tolist(), drafts.lengths.tolist(), strict=True)
        index = []
        for known, position, row, length in rows:
            prefix = known[:position] + row[:length]
            seen = [index_of.setdefault(tuple(prefix[:end]), len(index_of)) for end in range(position, len(prefix) + 1)]
            index.append(seen + [0] * (drafts.width - length))
        return self._processed([list(prefix) for prefix in index_of])[torch.tensor(index)]

    def _processed(self, prefixes: list[list[int]]) -> Tensor:
        """p of each prefix [len(prefixes), V]."""
        logits = self._ask(self._cond, "next_token_logits", prefixes)
        uncond, scale = None, None
        if self._uncond is not None:
            uncond = self._ask(self._uncond, "uncond_logits", prefixes).to(logits.dtype)[None]
            scale = torch.tensor([self._guidance_scale], dtype=torch.float64)
        return process_target(
            logits[None],
            uncond_logits=uncond,
            guidance_scale=scale,
            legal=self.legal_at(torch.zeros(1, len(prefixes))),
            temperature=torch.tensor([self._temperature], dtype=torch.float64),
            top_k=torch.tensor([self._top_k]) if self._top_k > 0 else None,
            top_p=torch.tensor([self._top_p], dtype=torch.float64) if self._top_p < 1 else None,
            max_top_k=self._top_k,
        )[0]

    def _ask(self, function: LogitsFunction, name: str, prefixes: list[list[int]]) -> Tensor:
        logits = torch.as_tensor(function(prefixes)).detach().cpu()
        columns = "V" if self._num_columns is None else self._num_columns
        is_right = logits.dim() == 2 and logits.shape[0] == len(prefixes) and logits.shape[1] > 0
        if not is_right or columns not in ("V", logits.shape[1]):
            raise ValueError(
                f"{name} must return [len(prefixes), V] = [{len(prefixes)}, {columns}], got {tuple(logits.shape)}"
            )
        if not bool(logits.amax(-1).isfinite().all()):  # NaN and inf show in the maximum; so does all -inf
            raise ValueError(f"{name} returned NaN, +inf, or a row of -inf only; each prefix needs a finite logit")
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _write(token_ids: Tensor, live: Tensor, positions: Tensor, emitted: Tensor) -> None:
    """Put emitted [R, W+1] (-1 padded) into rows `live` of token_ids from `positions` on."""
    row, slot = (emitted >= 0).nonzero(as_tuple=True)
    token_ids[live[row], positions[row] + slot] = emitted[row, slot]


def _as_first_guess(first_guess: str | FirstGuess | PrefixFunction, num_tokens: int) -> FirstGuess:
    if isinstance(first_guess, str):
        return get_first_guess(first_guess)
    if isinstance(first_guess, FirstGuess):
        return first_guess
    if not callable(first_guess):
        raise ValueError(f"first_guess must be a name, a FirstGuess or a function of the prefix, got {first_guess!r}")
    return PrefixGuess(first_guess, num_tokens)


def _whole(name: str, value: int, *, at_least: int) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if whole < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {whole}")
    return whole


def _checked_seed(seed: int, num_sequences: int) -> int:
    seed = _whole("seed", seed, at_least=-(2**63))
    if seed + num_sequences > 2**63:
        raise ValueError(f"seed + num_sequences must stay below 2**63, got {seed} + {num_sequences}")
    return seed


def _check_sampling(temperature: float, top_p: float, guidance_scale: float, has_uncond: bool) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] (1 is off), got {top_p!r}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale!r}")
    if guidance_scale != 1 and not has_uncond:
        raise ValueError(f"guidance_scale {guidance_scale!r} needs uncond_logits, the logits without the prompt")


def _legal_columns(allowed_token_ids: Sequence[int], num_columns: int) -> Tensor:
    ids = sorted({_whole("allowed_token_ids", token, at_least=0) for token in allowed_token_ids})
    if not ids:
        raise ValueError("allowed_token_ids is empty; name at least one token, or pass None to allow all")
    if ids[-1] >= num_columns:
        raise ValueError(f"allowed_token_ids has {ids[-1]}; the model has tokens 0..{num_columns - 1}")
    legal = torch.zeros(num_columns, dtype=torch.bool)
    legal[ids] = True
    return legal
