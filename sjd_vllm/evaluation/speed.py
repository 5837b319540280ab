"""Forwards and seconds of a run, by method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from sjd_vllm.evaluation.methods import PLAIN
from sjd_vllm.evaluation.run_folder import Record, RunFolder, pairs
from sjd_vllm.images.bench import mean_and_error, percentiles
from sjd_vllm.models.grammar import ImageGrammar


def speed_results(run: RunFolder) -> dict[str, Any]:
    """For each method with pictures: forwards, step compression, seconds, and how many times plain decoding's.

    `speedup` is the median over pictures of the same prompt and seed; only where plain decoding is in the run.
    """
    records = run.by_method()
    results: dict[str, Any] = {}
    for method in run.methods:
        own = records[method.label]
        if not own:
            continue
        forwards = [record.num_steps for record in own]
        mean, error = mean_and_error(forwards)
        compressions = [len(record.token_ids) / record.num_steps for record in own]
        seconds = [record.seconds for record in own]
        ratios = [other.seconds / one.seconds for one, other in pairs(own, records.get(PLAIN, []))]
        results[method.label] = {
            "name": method.name,
            "window": method.window,
            "num_pictures": len(own),
            "num_tokens": len(own[0].token_ids),
            "forwards_mean": mean,
            "forwards_se": error,
            "compression": sum(len(record.token_ids) for record in own) / sum(forwards),
            **{f"compression_{name}": value for name, value in percentiles(compressions).items()},
            **{f"seconds_{name}": value for name, value in percentiles(seconds).items()},
            "speedup": statistics.median(ratios) if ratios else None,
        }
    return results


def step_of_code(grammar: ImageGrammar, record: Record) -> list[list[int]]:
    """Which forward gave each code, counted from 0; rows by columns."""
    step_of_token = [step for step, count in enumerate(record.tokens_per_step) for _ in range(count)]
    rows, columns = grammar.grid
    positions = grammar.code_positions.tolist()
    return [[step_of_token[positions[row * columns + column]] for column in range(columns)] for row in range(rows)]


def acceptance_map(grammar: ImageGrammar, records: Sequence[Record]) -> list[list[float]]:
    """Share of pictures in which each code came as an accepted draft; rows by columns.

    A forward gives its accepted drafts and one more token, the last: a code that is not the last of its forward was
    an accepted draft.
    """
    rows, columns = grammar.grid
    totals = [[0.0] * columns for _ in range(rows)]
    for record in records:
        is_draft: list[bool] = []
        for count in record.tokens_per_step:
            is_draft += [True] * (count - 1) + [False]
        for index, position in enumerate(grammar.code_positions.tolist()):
            totals[index // columns][index % columns] += is_draft[position]
    return [[total / max(len(records), 1) for total in row] for row in totals]
