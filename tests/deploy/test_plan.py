"""The capacity model: what it computes, what it refuses, and how near it comes to what was measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from sjd_vllm.cli import main
from sjd_vllm.demo import checkpoint_path
from sjd_vllm.deploy.plan import CapacityModel, ModelShape, StepCost, smallest_batch_for

ROWS = Path(__file__).parents[2] / "benchmarks" / "results"
SHAPE = ModelShape.read(Path(checkpoint_path()))


def test_the_shape_of_the_demo_model() -> None:
    config = json.loads((Path(checkpoint_path()) / "config.json").read_text())
    assert SHAPE.num_layers == config["num_hidden_layers"]
    assert SHAPE.picture_tokens == 273
    size = (Path(checkpoint_path()) / "model.safetensors").stat().st_size
    assert 0.9 * size < SHAPE.num_parameters * 2 < 1.1 * size or 0.9 * size < SHAPE.num_parameters * 4 < 1.1 * size


def test_the_formulas_by_hand() -> None:
    shape = ModelShape(num_parameters=0, num_layers=2, num_kv_heads=3, head_dim=5, picture_tokens=100)
    model = CapacityModel(shape, StepCost(1.0, 0.5, 0.25), gain=1.0, prompt_tokens=20, bytes_per_number=2)
    capacity = model.at(batch=4, window=17)
    assert capacity.forwards == pytest.approx(100 / 1.5)
    assert capacity.step_seconds == pytest.approx(1 + 0.5 * 8 + 0.25 * 8 * 18)
    assert capacity.rate == pytest.approx(4 / (capacity.forwards * capacity.step_seconds))
    assert model.kv_bytes_per_picture == 2 * (2 * 2 * 3 * 5 * 2) * 120
    assert model.largest_batch(3.5 * model.kv_bytes_per_picture) == 3


def test_windows_follow_the_load() -> None:
    model = CapacityModel(SHAPE, StepCost(5e-3, 0, 1e-4))
    windows = [model.best(batch).window for batch in (1, 4, 16, 256)]
    assert windows == sorted(windows, reverse=True)
    assert windows[0] > 8 > windows[-1]
    chosen = smallest_batch_for(model, model.best(4).rate, 64)
    assert chosen is not None
    assert chosen.batch <= 4
    assert smallest_batch_for(model, 1e9, 64) is None


def test_a_fit_finds_the_costs() -> None:
    cost = StepCost(4e-3, 1e-4, 2e-5)
    steps = [(rows, rows * (1 + w), cost.seconds(rows, rows * (1 + w))) for rows in (2, 8, 16) for w in (0, 8, 64)]
    fitted = StepCost.fitted(steps)
    assert (fitted.fixed, fitted.per_row, fitted.per_token) == pytest.approx((4e-3, 1e-4, 2e-5))
    assert StepCost.fitted([(1, 1, 2.0), (2, 2, 1.0), (4, 4, 0.9)]).per_token >= 0


def test_it_comes_near_to_what_was_measured() -> None:
    """Plain decoding at 1 and 64 pictures and SJD at 1 give the three costs; the loads between are predicted."""
    with (ROWS / "load_curve.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["commit"] == "a28e211"]
    seconds = {(row["method"], int(row["concurrency"])): float(row["latency_p50"]) for row in rows}
    assert len(seconds) == 21
    # a picture more is two rows and two tokens more in each step
    per_picture = (seconds["plain", 64] - seconds["plain", 1]) / 63 / SHAPE.picture_tokens
    fixed = seconds["plain", 1] / SHAPE.picture_tokens - per_picture
    models = [
        CapacityModel(SHAPE, StepCost(fixed, (1 - share) * per_picture / 2, share * per_picture / 2))
        for share in np.linspace(0.05, 1, 96)
    ]
    model = min(models, key=lambda model: abs(model.best(1).latency - seconds["sjd", 1]))
    between = (2, 4, 8, 16, 32)
    plain = [model.at(batch, 0).latency / seconds["plain", batch] for batch in between]
    sjd = [model.best(batch).latency / seconds["sjd", batch] for batch in between]
    print(f"{fixed=} {model.cost=} {plain=} {sjd=}")
    assert all(0.85 < ratio < 1.15 for ratio in [*plain, *sjd]), (plain, sjd)


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--step-ms", "5", "--row-us", "50", "--token-us", "120", "--gpus", "2", "--rate", "3", "--gpu-memory", "1"]
    assert main(["plan", *flags]) == 0
    text = capsys.readouterr().out
    assert "For 3 pictures a second" in text
    assert main(["plan", *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["replicas"] == 2
    assert plan["chosen"]["rate"] >= 3 / 0.7
    assert plan["chosen"]["latency_seconds"] == pytest.approx(
        plan["chosen"]["forwards"] * plan["chosen"]["step_ms"] / 1e3
    )
    assert main(["plan", *flags, "--json", "--rate", "1000"]) == 0
    assert json.loads(capsys.readouterr().out)["replicas_needed"] > 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "gpus must be"),
        (["--gpus", "2", "--tensor-parallel-size", "4"], "gpus must be a whole number from 4"),
        (["--rate", "0"], "--rate must be a number above 0"),
        (["--step-ms", "5"], "go together"),
        (["--utilization", "1.5"], "at most 1"),
        (["--gpu-memory", "0.001"], "one picture does not fit"),
        (["--model", "/nowhere"], "model must be the folder"),
    ],
)
def test_bad_flags_take_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
