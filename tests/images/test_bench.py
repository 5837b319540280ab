"""The benchmark at a tiny scale, and the files that it writes."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from sjd_vllm import ImagePipeline
from sjd_vllm.config import ConfigError
from sjd_vllm.images.bench import mean_and_error, percentiles, run_bench
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.request import ImageRequest
from sjd_vllm.images.rows import append_rows, check_rows_file, rounded

PROMPTS = ["a red house", "a blue lake", "lake at night"]


def test_both_methods_see_the_same_prompts_and_seeds(pipeline: ImagePipeline) -> None:
    requests = [ImageRequest(prompt, seed=index) for index, prompt in enumerate(PROMPTS)]
    turns: list[tuple[int, int]] = []
    report = run_bench(pipeline, requests, [1, 2], lambda done, total: turns.append((done, total)))
    assert turns[-1] == (12, 12)
    assert [(m.concurrency, m.method) for m in report.measurements] == [
        (1, "none"),
        (1, "sjd"),
        (2, "none"),
        (2, "sjd"),
    ]
    for measurement in report.measurements:
        asked = [(picture.request.prompt, picture.request.seed) for picture in measurement.pictures]
        assert asked == [(prompt, index) for index, prompt in enumerate(PROMPTS)]
    plain, sjd = report.measurements[:2]
    assert plain.row()["forwards_mean"] == 43
    assert plain.tokens_per_forward == 1
    assert report.step_compression() == sjd.tokens_per_forward > 1
    assert report.latency_ratio() == plain.latency_p50 / sjd.latency_p50
    assert report.throughput_ratio().keys() == {1, 2}


def test_percentiles_are_interpolated() -> None:
    assert percentiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}
    assert percentiles([0, 1, 2, 3, 4, 5]) == {"p20": 1.0, "p50": 2.5, "p80": 4.0}


def test_the_standard_error_is_that_of_the_mean() -> None:
    mean, error = mean_and_error([1, 2, 3, 4])
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(mean_and_error([1])[1])


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append_rows(path, [{"a": 1, "b": "x, y"}])
    append_rows(path, [{"a": rounded(2.34567), "b": "z"}])
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y"}, {"a": "2.346", "b": "z"}]
    with pytest.raises(ConfigError, match="other columns"):
        append_rows(path, [{"a": 1, "c": 2}])
    with pytest.raises(ConfigError, match="cannot write rows"):
        check_rows_file(tmp_path / "missing" / "rows.csv", ["a"])


def test_provenance_names_hardware_and_versions() -> None:
    facts = provenance()
    assert list(facts) == ["date", "commit", "hardware", "versions"]
    assert "torch" in facts["versions"]
    assert facts["hardware"]
