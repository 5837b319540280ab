"""Jacobi decoding under noise that is fixed: the strategy `gumbel`.

Position t has Gumbel noise g_t(v) that depends on the request's seed, on t and on the token v, and on nothing else.
Every token is the choice of the noise,

    y_t = argmax_v (log p(v | y_<t) + g_t(v)),

which is a draw from p (the Gumbel-max trick). With the noise fixed the sequence is one function of seed and model, and
decoding is solving y = f(y): a sweep makes the choice at all positions of a window at once, given the drafts left of
each; a choice whose prefix was right is final, the others are better drafts. (Wiggers and Hoogeboom, "Predictive
Sampling with Forecasting Autoregressive Models", ICML 2020, arXiv 2002.09928; Song et al., arXiv 2002.03629.)

So drafts decide how soon a token comes and never which one: they may be made, cut and replaced in any way, by load, by
content, even by looking right. No distribution of a draft is kept, and no test tosses a coin.

Dimension letters: R requests, T positions of a finished sequence, N rows (a scored position each), V columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .randomness import gumbel_noise
from .target import COLDEST, keep_top, mix_guidance


def gumbel_choices(
    logits: Tensor,
    token_ids: Tensor,
    *,
    seeds: Tensor,
    positions: Tensor,
    uncond_logits: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | None = None,
    max_top_k: int | None = None,
) -> Tensor:
    """The token that the noise picks in each row -> long [N]; -1 where the logits are NaN or all -inf.

    logits, uncond_logits: floating point [N, V], of the legal columns only.
    token_ids: long [V], the columns' names. Noise belongs to the token, wherever its column stands.
    seeds, positions: long [N], the keys of the noise.
    guidance_scale, temperature, top_k, top_p, max_top_k: as in `process_target`, one value a row.
    """
    mixed = logits
    if uncond_logits is not None and guidance_scale is not None:
        mixed = mix_guidance(logits, uncond_logits, guidance_scale[:, None].to(logits.dtype))
    scaled = mixed
    if temperature is not None:
        scaled = mixed / temperature.to(mixed.dtype).clamp(min=COLDEST)[:, None]
    columns = None
    if isinstance(top_k, int) and top_p is None and 0 < top_k < scaled.shape[-1]:
        scaled, columns = _highest(scaled, top_k)
    elif top_k is not None or top_p is not None:
        scaled = keep_top(scaled[:, None], top_k, top_p, max_top_k)[:, 0]
    named = token_ids if columns is None else token_ids[columns]
    best, place = (scaled + gumbel_noise(seeds, positions, named, scaled.dtype)).max(-1)
    chosen = named[place] if columns is None else named.gather(-1, place[:, None])[:, 0]
    if temperature is not None:
        greedy_best, greedy_place = mixed.max(-1)  # the first of equals
        is_greedy = temperature <= 0
        best = torch.where(is_greedy, greedy_best, best)
        chosen = torch.where(is_greedy, token_ids[greedy_place], chosen)
    # a comparison with NaN is false; top-k may have dropped one, so the whole row is looked at
    return torch.where((best > -torch.inf) & (mixed.amax(-1) > -torch.inf), chosen, -1)


def sweep(drafts: Tensor, rows: Tensor, positions: Tensor, choices: Tensor, starts: Tensor) -> Tensor:
    """Put the choices in place of the drafts, and say how many of them are final -> long [R], at least 1.

    drafts: long [*, T]; what is known of each sequence, changed in place. Position t of the sequence is column t.
    rows, positions: long [N]; which draft each row scored. A request's rows are consecutive and start at its first
        position that is not final.
    choices: long [N]; what the noise picks there, given the drafts left of it; -1 leaves the draft.
    starts: long [R]; the first row of each request, ascending from 0.

    The first choice is final, since all left of it is; the next one is, if the draft before it was the choice; and
    so on. The last row of a request scored no draft, so it ends the count.
    """
    old = drafts[rows, positions]
    drafts[rows, positions] = torch.where(choices >= 0, choices, old)
    num_rows = torch.diff(starts, append=starts.new_full((1,), len(rows)))
    request = torch.arange(len(starts), device=rows.device).repeat_interleave(num_rows, output_size=len(rows))
    num_seen = torch.arange(1, len(rows) + 1, device=rows.device) - starts[request]
    ends_at = torch.where(old == choices, num_rows[request], num_seen)
    return num_rows.scatter_reduce(0, request, ends_at, "amin")


def _highest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row [N, count] in any order, and their columns; the lowest columns among equals."""
    if logits.device.type == "cpu":  # numpy selects several times as fast as torch
        order = np.argpartition(logits.numpy(), logits.shape[-1] - count, axis=-1)
        columns = torch.from_numpy(order[:, logits.shape[-1] - count :])
        values = logits.gather(-1, columns)
    else:
        values, columns = logits.topk(count, dim=-1, sorted=False)
    # a selection takes any of the columns that tie for the last place
    is_exact = (logits >= values.amin(-1, keepdim=True)).sum() == columns.numel()
    if not bool(is_exact):  # more tie than were taken, or NaN
        values, columns = logits.sort(dim=-1, descending=True, stable=True)
        values, columns = values[:, :count], columns[:, :count]
    return values, columns
