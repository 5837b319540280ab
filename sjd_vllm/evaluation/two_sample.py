"""Two-sample tests between the pictures of two methods, from tokens alone.

Both methods paint the same prompts, so under equal laws the two pictures of a pair may be exchanged. The swap test
compares a statistic with its values after random exchanges: exact at any sample size, with no assumption about how
tokens hang together inside a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sjd_vllm.evaluation.methods import PLAIN
from sjd_vllm.evaluation.run_folder import RunFolder, pairs
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.grammar import ImageGrammar

RESULTS = "two_sample.json"
_NUM_SWAPS = 9999
_FloatArray = np.ndarray[Any, np.dtype[np.float64]]


def picture_statistics(grammar: ImageGrammar, token_ids: Sequence[int]) -> dict[str, float]:
    """What is compared between methods, of one picture.

    same_as_left, same_as_above: share of codes equal to that neighbour. distinct: different codes by the number of
    codes. entropy: of the picture's own code counts, in bits.
    """
    codes = grammar.codes(list(token_ids))
    counts = torch.bincount(codes.flatten()).double()
    share = counts[counts > 0] / codes.numel()
    return {
        "same_as_left": float((codes[:, 1:] == codes[:, :-1]).double().mean()) if codes.shape[1] > 1 else 0.0,
        "same_as_above": float((codes[1:] == codes[:-1]).double().mean()) if codes.shape[0] > 1 else 0.0,
        "distinct": float((counts > 0).sum() / codes.numel()),
        "entropy": float(-(share * share.log2()).sum()),
    }


def swap_test(differences: _FloatArray, seed: int = 0) -> float:
    """p-value of mean(differences) = 0 under random signs; differences [P], one a pair. 1 where all are 0.

    >>> swap_test(np.zeros(8)), swap_test(np.ones(30)) < 0.001
    (1.0, True)
    """
    signs = _signs(len(differences), seed)
    observed = abs(differences.sum())
    swapped = np.abs(signs @ differences)
    return _p_value(observed, swapped)


def histogram_swap_test(first: _FloatArray, second: _FloatArray, seed: int = 0) -> float:
    """p-value that two methods use the codes alike; counts [P, K] of each picture, chi-square distance of the sums."""
    used = (first + second).sum(0) > 0
    difference, total = (first - second)[:, used], (first + second)[:, used].sum(0)
    signs = _signs(len(difference), seed)
    observed = float((difference.sum(0) ** 2 / total).sum())
    swapped = ((signs @ difference) ** 2 / total).sum(1)
    return _p_value(observed, swapped)


def two_sample_results(run: RunFolder, family: ImageFamily, against: str = PLAIN) -> dict[str, Any]:
    """Every method against plain decoding (or another): means, p-values; also written to the run folder.

    {} where the run has no such method. `seconds` and steps are not compared: they ought to differ.
    """
    records = run.by_method()
    if not records.get(against):
        return {}
    grammar = family.grammar(family.size(run.settings["size"]))
    num_codes = int(grammar.code_of_column.max()) + 1
    results: dict[str, Any] = {}
    for label, own in records.items():
        compared = list(pairs(own, records[against]))
        if label == against or not compared:
            continue
        rows = [[picture_statistics(grammar, record.token_ids) for record in pair] for pair in compared]
        counts = [np.stack([_counts(grammar, pair[side].token_ids, num_codes) for pair in compared]) for side in (0, 1)]
        results[label] = {
            "num_pairs": len(compared),
            "statistics": {
                name: {
                    "mean": float(np.mean([one[name] for one, _ in rows])),
                    "mean_of_other": float(np.mean([other[name] for _, other in rows])),
                    "p": swap_test(np.array([one[name] - other[name] for one, other in rows])),
                }
                for name in rows[0][0]
            }
            | {"code_counts": {"p": histogram_swap_test(counts[0], counts[1])}},
        }
    run.write(RESULTS, {"against": against, "methods": results})
    return results


def _counts(grammar: ImageGrammar, token_ids: list[int], num_codes: int) -> _FloatArray:
    counts: _FloatArray = torch.bincount(grammar.codes(token_ids).flatten(), minlength=num_codes).double().numpy()
    return counts


def _signs(num_pairs: int, seed: int) -> _FloatArray:
    return np.random.default_rng(seed).choice((-1.0, 1.0), size=(_NUM_SWAPS, num_pairs))


def _p_value(observed: float, swapped: _FloatArray) -> float:
    # The observed order is one of the exchanges, so p is never 0. A hair below, for sums in another order.
    return float((1 + (swapped >= observed * (1 - 1e-9)).sum()) / (1 + len(swapped)))
