"""Demo model: does the scorer read back what the captions asked for, and does it for every method alike?"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from PIL import Image

from sjd_vllm.demo.captions import ATTRIBUTES
from sjd_vllm.demo.encode import to_pixels
from sjd_vllm.demo.scorer import Scorer, accuracies
from sjd_vllm.evaluation.methods import PLAIN
from sjd_vllm.evaluation.run_folder import RunFolder, pairs

RESULTS = "accuracy.json"
CONFIDENCE = 0.95
_BATCH = 64


def accuracy_results(run: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """Share of attributes read back right by method, and its difference from plain decoding on the same captions.

    checkpoint: the demo model's folder, whose scorer is used. The difference comes with a paired confidence interval,
    in the same unit. {} for runs of another suite; also written to the run folder.
    """
    if run.settings["suite"] != "demo":
        return {}
    scorer = Scorer.from_pretrained(checkpoint / "scorer")
    prompts, records = run.prompts, run.by_method()
    predicted: dict[str, dict[tuple[int, int], list[int]]] = {}
    for label, own in records.items():
        classes: list[list[int]] = []
        for start in range(0, len(own), _BATCH):
            images = [np.asarray(Image.open(run.path / record.path)) for record in own[start : start + _BATCH]]
            classes += scorer.classify(to_pixels(np.stack(images).transpose(0, 3, 1, 2))).tolist()
        predicted[label] = {record.key: row for record, row in zip(own, classes, strict=True)}
    results: dict[str, Any] = {}
    for label, own in records.items():
        if not own:
            continue
        labels = torch.tensor([prompts[record.prompt_index].source["labels"] for record in own])
        shares = accuracies(torch.tensor([predicted[label][record.key] for record in own]), labels)
        results[label] = {"num_pictures": len(own), "accuracy": shares}
        if label != PLAIN and records.get(PLAIN):
            results[label]["difference"] = _differences(run, predicted, label)
    content = {"confidence": CONFIDENCE, "methods": results}
    run.write(RESULTS, content)
    return content


def paired_interval(num_won: int, num_lost: int, num_pairs: int) -> tuple[float, float, float]:
    """Difference of two shares over the same pairs, and its confidence interval (Agresti and Min, 2005).

    num_won: pairs that the first has right and the second wrong; num_lost: the other way round. Half a pair is added
    to each cell of the table, so that the interval has a width where nothing differs.

    >>> [round(value, 3) for value in paired_interval(num_won=6, num_lost=2, num_pairs=100)]
    [0.04, -0.018, 0.096]
    """
    won, lost, total = num_won + 0.5, num_lost + 0.5, num_pairs + 2
    difference = (won - lost) / total
    error = math.sqrt(won + lost - (won - lost) ** 2 / total) / total
    reach = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * error
    return (num_won - num_lost) / num_pairs, difference - reach, difference + reach


def _differences(
    run: RunFolder, predicted: dict[str, dict[tuple[int, int], list[int]]], label: str
) -> dict[str, list[float]]:
    prompts, records = run.prompts, run.by_method()
    won, lost, counted = (np.zeros(len(ATTRIBUTES)) for _ in range(3))
    for one, _ in pairs(records[label], records[PLAIN]):
        labels = np.array(prompts[one.prompt_index].source["labels"])
        is_right = [np.array(predicted[name][one.key]) == labels for name in (label, PLAIN)]
        won += is_right[0] & ~is_right[1] & (labels >= 0)
        lost += ~is_right[0] & is_right[1] & (labels >= 0)
        counted += labels >= 0
    return {
        name: list(paired_interval(int(won[index]), int(lost[index]), int(counted[index])))
        for index, name in enumerate(ATTRIBUTES)
        if counted[index]
    }
