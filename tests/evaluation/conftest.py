"""A random checkpoint and one run of `sjd-vllm eval` on it, for all tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sjd_vllm.cli import main
from tiny_models import make_tiny_painter

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(scope="session")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 tokens a picture, guidance 2."""
    return make_tiny_painter(tmp_path_factory.mktemp("evaluated") / "painter")


@pytest.fixture(scope="session")
def evaluate(painter: Path) -> Callable[..., int]:
    """`sjd-vllm eval` on that checkpoint, in this process; returns the exit code."""

    def run(*arguments: str) -> int:
        return main(["eval", "--model", str(painter), "--num-speculative-tokens", "8", *arguments])

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, evaluate: Callable[..., int]) -> Path:
    """A GenEval run of five methods, stopped in the middle, taken up again, and tested for losslessness."""
    folder = tmp_path_factory.mktemp("runs") / "geneval"
    arguments = [
        *("--suite", "geneval", str(SAMPLES / "evaluation_metadata.jsonl"), "--n", "6", "--batch-size", "4"),
        *("--methods", "none,gumbel,coupled,reuse@4,reuse_biased", "--reuse-threshold", "0.05", "-o", str(folder)),
    ]
    assert evaluate(*arguments) == 0
    whole = (folder / "records.jsonl").read_text()
    # as a crash leaves it: some pictures are missing, and the last line is torn
    lines = whole.splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:70]) + lines[70][:40])
    (folder / "before-the-crash.json").write_text(json.dumps([json.loads(line) for line in lines]))
    assert evaluate(*arguments, "--lossless") == 0
    return folder


@pytest.fixture(scope="session")
def records(finished: Path) -> list[dict[str, Any]]:
    """All records of that run."""
    return [json.loads(line) for line in (finished / "records.jsonl").read_text().splitlines()]
