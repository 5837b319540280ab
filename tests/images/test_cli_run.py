"""The installed command as a user runs it, in processes of its own, on the shipped demo model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

COMMAND = str(Path(sys.executable).parent / "sjd-vllm")
NUM_PROMPTS = 3


def _run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=580)


@pytest.fixture(scope="module")
def demo_path() -> str:
    return _run("demo-path").stdout.strip()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return _run("demo-prompts", str(NUM_PROMPTS), "--seed", "11").stdout.splitlines()


@pytest.fixture(scope="module")
def report(prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Greedy pictures, one prompt as an argument and the others on standard input."""
    sheet = tmp_path_factory.mktemp("out") / "landscapes.png"
    settings = ["--seed", "3", "--temperature", "0", "--guidance-scale", "2.5", "--num-speculative-tokens", "24"]
    done = _run(
        "generate",
        prompts[0],
        "--prompts-file",
        "-",
        "-o",
        str(sheet),
        "--json",
        *settings,
        stdin="\n".join(prompts[1:]),
    )
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)  # one object, and nothing else
    assert done.stdout.count("\n") == 1
    assert "row" in done.stderr
    return parsed


def test_pictures_stand_in_the_order_of_the_prompts(report: dict[str, Any], prompts: list[str]) -> None:
    assert [picture["prompt"] for picture in report["pictures"]] == prompts
    assert [picture["seed"] for picture in report["pictures"]] == [3] * NUM_PROMPTS


def test_files_and_their_metadata(report: dict[str, Any]) -> None:
    for picture in report["pictures"]:
        with Image.open(picture["path"]) as saved:
            assert saved.size == (96, 96)
            assert saved.text["prompt"] == picture["prompt"]  # type: ignore[attr-defined]
            assert saved.text["method"] == "sjd"  # type: ignore[attr-defined]
    assert Path(report["contact_sheet"]).name == "landscapes.png"
    assert Image.open(report["contact_sheet"]).width > 96


def test_drafts_save_forwards(report: dict[str, Any]) -> None:
    for picture in report["pictures"]:
        assert picture["num_tokens"] == len(picture["token_ids"]) == 273
        assert picture["num_steps"] < picture["num_tokens"]
        assert picture["step_compression"] == picture["num_tokens"] / picture["num_steps"]
        assert picture["seconds"] > 0


def test_the_report_is_enough_to_teacher_force(report: dict[str, Any], demo_path: str) -> None:
    """Greedy tokens are Transformers' argmax of the guided logits over the legal ids, at every position."""
    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32).eval()
    for picture in report["pictures"]:
        tokens = picture["token_ids"]
        cond, uncond = (
            _logits(model, picture[name], tokens) for name in ("prompt_token_ids", "negative_prompt_token_ids")
        )
        logits = uncond + picture["guidance_scale"] * (cond - uncond)
        legal = torch.full_like(logits, -torch.inf)
        for position, ranges in enumerate(picture["legal_token_ranges"]):
            for first, end in ranges:
                legal[position, first:end] = 0
        masked = logits + legal
        chosen = masked.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        # equal up to the rounding of two implementations in float32
        assert float((masked.amax(1) - chosen).max()) < 1e-3


@torch.inference_mode()
def _logits(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """float32 [T, V]: the row before each of T tokens."""
    logits: torch.Tensor = model(torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 : -1]


def test_plain_decoding_and_readable_output(prompts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    done = _run("generate", prompts[0], "-o", str(path), "--seed", "3", "--method", "none")
    assert done.returncode == 0, done.stderr
    assert "273 tokens in 273 forwards" in done.stdout
    assert sorted(tmp_path.iterdir()) == [path]
    with Image.open(path) as saved:
        assert saved.text["num_speculative_tokens"] == "0"  # type: ignore[attr-defined]


def test_ctrl_c_is_quiet(painter: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [COMMAND, "generate", "a red house", "--n", "100", "--model", str(painter), "-o", str(output)]
    # A shell's background jobs, and whatever they start, ignore the signal unless told otherwise.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = ""
        while "decoding" not in said:
            letter = process.stderr.read(1)
            assert letter, said
            said += letter
        process.send_signal(signal.SIGINT)
        out, err = process.stdout.read(), said + process.stderr.read()
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert not list(output.iterdir())


def test_bench_in_one_object(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    done = _run("bench", "--json", "--prompts", "2", "--concurrency", "2", "--output-row", str(rows))
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert measured["step_compression"] > 1
    assert measured["latency_ratio"] > 0
    assert measured["throughput_ratio"].keys() == {"1", "2"}
    assert {"date", "commit", "hardware", "versions", "measurements"} <= measured.keys()
    assert len(rows.read_text().splitlines()) == 1 + len(measured["measurements"]) == 5
