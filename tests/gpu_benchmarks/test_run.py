"""The one command: what it refuses, what it starts, how it goes on, what it says of the targets."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import run, targets
from benchmarks.gpu.common import RESULTS, Rows, Run, parser
from benchmarks.gpu.install import environment
from sjd_vllm.config import ConfigError

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def flags(*given: str) -> Any:
    return parser(None).parse_args(list(given))


@no_gpu
def test_without_a_gpu_only_small_runs() -> None:
    with pytest.raises(ConfigError, match="no GPU was found"):
        Run.from_flags(flags())


@pytest.mark.parametrize("folder", [RESULTS, RESULTS / "deeper"])
def test_no_row_of_a_small_run_among_the_results(folder: Path) -> None:
    with pytest.raises(ConfigError, match="do not belong"):
        Run.from_flags(flags("--small", "--output", str(folder)))


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py"), "--parts", "steps,lattency"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'lattency'" in done.stderr


def test_a_cell_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(tmp_path / "rows.csv", ("window",))
    assert not rows.has(window=16)
    rows.append({"window": 16, "step_ms": 1.5})
    assert rows.has(window=16)
    assert not rows.has(window=32)
    # another runner's rows are others
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert not Rows(tmp_path / "rows.csv", ("window",)).has(window=16)


def test_a_part_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    """A process and its child sleep; neither is left."""
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    with (tmp_path / "log").open("w+") as log:
        began = time.monotonic()
        code = f"import sys; sys.stdout = sys.stderr; {code}"
        assert run._run([sys.executable, "-c", code], environment(tmp_path), log, began + 3) == run._UNFINISHED
        assert time.monotonic() - began < 30
        log.seek(0)
        child = int(log.read())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1]


def test_what_runs_ends_with_the_command(tmp_path: Path) -> None:
    """The set-up, whose process is told by its flag; it is the command's own child, in a session of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py"), "--small", "--work", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "== setup\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until = time.monotonic() + 30
        while not (started := children.read_text().split()) and time.monotonic() < until:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 143
    assert len(started) == 1
    assert not Path(f"/proc/{started[0]}").exists()


def test_a_part_goes_on_after_one_of_its_processes_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(minutes=5.0, work=tmp_path, small=True)
    processes = [["no_such_module"], ["targets", "--small", "--output", str(tmp_path / "rows")]]
    assert run._run_part("steps", processes, args) == 1
    said = capfd.readouterr()
    assert "failed: no_such_module" in said.err
    assert said.out.count("not measured") == len(targets.TARGETS)


def test_what_is_said_of_the_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows(tmp_path / "gpu_steps.csv", ())
    for window, step, share in ((0, 10.0, 0.02), (32, 11.0, 0.08)):
        rows.append({"window": window, "batch": 1, "step_ms_p50": step, "outside_forward_share": share})
    parts = {"steps": targets.own_rows(tmp_path / "gpu_steps.csv"), "latency": [], "kernels": []}
    verdicts = [target.verdict(target.value(parts)) for target in targets.TARGETS]
    assert verdicts == ["reached", "missed", *["not measured"] * 5]
    # rows of another commit say nothing of this one
    path = tmp_path / "gpu_steps.csv"
    with path.open(newline="") as file:
        old = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(old[0]))
        writer.writeheader()
        writer.writerows({**row, "commit": "0000000"} for row in old)
    assert targets.own_rows(path) == []
