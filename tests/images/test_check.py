"""`sjd-vllm check`: what it says of good and of broken checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sjd_vllm.cli import main
from sjd_vllm.demo import checkpoint_path


def test_the_demo_model_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(checkpoint_path())
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "family    demo, 4 layers" in said
    assert "96x96 (273 tokens), 96x72 (205 tokens), 96x48 (137 tokens)" in said
    assert "guidance 3, temperature 1, top-k 100, top-p 1" in said
    assert said.endswith("ready to be served\n")
    assert main(["check", path, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stored = sum(file.stat().st_size for file in checkpoint_path().rglob("*.safetensors"))
    assert report["weight_bytes"] == stored
    # 4 layers of 3 heads of 64 numbers, keys and values, 2 bytes each, 273 tokens, both halves
    assert report["sizes"][0]["guided_kv_bytes"] == 4 * 3 * 64 * 2 * 2 * 273 * 2
    assert report["problems"] == []


def test_problems_are_listed_and_the_exit_code_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((checkpoint_path() / "config.json").read_text())
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "problem   there are no weights" in said
    assert said.endswith("1 to be mended\n")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "of no image family that is known: demo"),
        ("{", "is not JSON"),
        ("[]", "holds no object"),
        ('{"model_type": "llama"}', "of no image family that is known: demo"),
        ('{"sjd": {"family": "dome"}}', "names the family 'dome'"),
        ('{"sjd": {"family": "demo"}}', "cannot be read"),
    ],
)
def test_what_is_no_checkpoint_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str | None, said: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert main(["check", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert main(["check", str(tmp_path / "missing")]) == 2
    assert "is not a folder" in capsys.readouterr().err
