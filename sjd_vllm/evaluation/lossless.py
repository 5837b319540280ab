"""Losslessness: were the tokens of each method drawn from the model's own distributions?

Three kinds of evidence, from strict to strictest:

* two-sample tests between the methods' pictures (`two_sample`), which need no model;
* the martingale test (`sjd_vllm.core.martingale`): each token against the distribution that the model gives it, which
  a biased method fails, with the bias that it would have seen at this sample;
* identity: under fixed noise a seed's picture is that of plain decoding, token for token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from sjd_vllm.core import MartingaleSum, martingale_sums
from sjd_vllm.evaluation.methods import PLAIN
from sjd_vllm.evaluation.reference import Reference
from sjd_vllm.evaluation.run_folder import RunFolder, pairs
from sjd_vllm.images.request import PictureRequest

RESULTS = "lossless.json"
_SUMS = "lossless.jsonl"
# Probability that any of the exact methods' statistics passes its limit by chance.
FALSE_ALARM = 0.001
POWER = 0.9

# Share of tokens that the reference gives no probability, above which something is wrong. In bfloat16 a forward over a
# window and one over the whole picture may disagree about the last of the top-k tokens; such tokens are left out.
MAX_OUTSIDE = 0.001

_Key = tuple[str, int, int]
_Sums = dict[str, MartingaleSum]  # of one picture; "outside" counts the tokens left out, in its num_tokens
_OUTSIDE = "outside"


def limit_for(num_tests: int) -> float:
    """|z| that all of `num_tests` standard normals stay below with probability 1 - FALSE_ALARM (Bonferroni).

    >>> round(limit_for(1), 2), round(limit_for(25), 2)
    (3.29, 4.11)
    """
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * max(num_tests, 1)))


def score_pictures(
    run: RunFolder,
    reference: Callable[[], Reference],
    planned: dict[str, list[tuple[int, int, PictureRequest]]],
    on_pictures: Callable[[int, int], None] | None = None,
) -> None:
    """Sum the martingale statistics of every picture that has none yet; may be stopped and taken up.

    reference: starts the engine; called once, and only if there is something to do. Two methods' pictures of the same
    tokens are scored once.
    """
    done = _read_sums(run.path / _SUMS)
    records = {(record.method, *record.key): record for record in run.records()}
    requests = {
        (label, prompt, image): request for label, entries in planned.items() for prompt, image, request in entries
    }
    todo = [key for key in records if key not in done]
    known = {(*key[1:], tuple(records[key].token_ids)): sums for key, sums in done.items()}
    scorer: Reference | None = None
    try:
        for index, key in enumerate(todo):
            tokens = tuple(records[key].token_ids)
            same = (*key[1:], tokens)
            if same not in known:
                scorer = scorer or reference()
                known[same] = _sums_of(scorer, requests[key], list(tokens))
            _append_sums(run.path / _SUMS, key, known[same])
            if on_pictures is not None:
                on_pictures(index + 1, len(todo))
    finally:
        if scorer is not None:
            scorer.close()


def lossless_results(run: RunFolder) -> dict[str, Any]:
    """Everything that is known so far, as plain JSON types; also written to the run folder.

    For each method and statistic: z, the mean excess of a token, and the smallest bias of that mean that would have
    passed the limit with probability POWER. `identical`: pictures equal to plain decoding's, of how many compared.
    """
    sums = _read_sums(run.path / _SUMS)
    by_method: dict[str, _Sums] = {}
    for (label, _, _), picture in sums.items():
        _add(by_method.setdefault(label, {}), picture)
    outside = {label: total.pop(_OUTSIDE).num_tokens for label, total in by_method.items()}
    exact = [method for method in run.methods if method.is_exact and method.label in by_method]
    limit = limit_for(sum(len(by_method[method.label]) for method in exact))
    quantile = NormalDist().inv_cdf(POWER)
    records = run.by_method()
    methods = {}
    for method in run.methods:
        total = by_method.get(method.label, {})
        compared = list(pairs(records[method.label], records.get(PLAIN, [])))
        methods[method.label] = {
            "is_exact": method.is_exact,
            "num_pictures": sum(1 for key in sums if key[0] == method.label),
            "outside": outside.get(method.label, 0),
            "statistics": {
                name: {
                    "z": value.z_score,
                    "bias": value.excess / value.num_tokens,
                    "visible_bias": value.smallest_visible_bias(limit, quantile),
                    "num_tokens": value.num_tokens,
                }
                for name, value in total.items()
            },
            "identical": {
                "pictures": sum(one.token_ids == other.token_ids for one, other in compared),
                "of": len(compared),
            },
        }
    results = {"limit": limit, "false_alarm": FALSE_ALARM, "power": POWER, "methods": methods}
    run.write(RESULTS, results)
    return results


def verdict(results: dict[str, Any], label: str) -> str:
    """One line about one method."""
    method = results["methods"][label]
    if not method["statistics"]:
        return "not tested"
    name, worst = max(method["statistics"].items(), key=lambda item: abs(item[1]["z"]))
    if method["outside"] > MAX_OUTSIDE * worst["num_tokens"]:
        return f"NOT THE MODEL'S: {method['outside']} tokens have no probability"
    if abs(worst["z"]) > results["limit"]:
        return f"{'BIASED' if method['is_exact'] else 'biased, as it must be'}: {name}, z = {worst['z']:.1f}"
    return f"{'no bias seen' if method['is_exact'] else 'its bias was not seen'}: largest |z| is {abs(worst['z']):.1f}"


@torch.inference_mode()
def _sums_of(reference: Reference, picture: PictureRequest, token_ids: list[int]) -> _Sums:
    total: _Sums = {}
    for probs, tokens in reference.target_probs(picture, token_ids):
        is_inside = probs.gather(1, tokens[:, None])[:, 0] > 0
        _add(total, martingale_sums(probs[is_inside], tokens[is_inside]))
        _add(total, {_OUTSIDE: MartingaleSum(0.0, 0.0, int((~is_inside).sum()))})
    return total


def _add(total: _Sums, more: _Sums) -> None:
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def _append_sums(file: Path, key: _Key, sums: _Sums) -> None:
    values = {name: [value.excess, value.variance, value.num_tokens] for name, value in sums.items()}
    with file.open("a") as stream:
        stream.write(json.dumps([*key, values]) + "\n")


def _read_sums(file: Path) -> dict[_Key, _Sums]:
    if not file.is_file():
        return {}
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if len(whole) < len(text):  # a crash tore the last line off
        file.write_text(whole)
    found = {}
    for line in whole.splitlines():
        label, prompt, image, values = json.loads(line)
        found[(label, prompt, image)] = {name: MartingaleSum(*value) for name, value in values.items()}
    return found
