"""Bad input to the command: one clear line and exit code 2, before the engine starts."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sjd_vllm.cli import main
from sjd_vllm.images.pipeline import ImagePipeline

COMMAND = str(Path(sys.executable).parent / "sjd-vllm")
LONG = "'" + "a red house " * 50 + "'"


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(self: ImagePipeline) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(ImagePipeline, "start", start)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    text_model = tmp_path / "text-model"
    text_model.mkdir()
    (text_model / "config.json").write_text('{"model_type": "llama"}')
    (text_model / "model.safetensors").touch()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (broken / "model.safetensors").touch()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "say what to do: generate, bench"),
        ("paint x", "invalid choice: 'paint'"),
        ("generate x", "required: -o"),
        ("generate -o a.png MODEL", "give at least one prompt"),
        ("generate '' -o a.png MODEL", "prompt is empty"),
        ("generate x ' ' -o a.png MODEL", "prompt is empty"),
        (f"generate {LONG} -o a.png MODEL", "the prompt is too long: 152 tokens"),
        (f"generate x --negative-prompt {LONG} -o a.png MODEL", "the negative prompt is too long"),
        ("generate --prompts-file empty.txt -o a.png MODEL", "no prompts in 'empty.txt'"),
        ("generate --prompts-file missing.txt -o a.png MODEL", "cannot read prompts from 'missing.txt'"),
        ("generate --prompts-file latin.txt -o a.png MODEL", "cannot read prompts from 'latin.txt'"),
        ("generate x -o a.png --model missing", "'missing' is not a folder"),
        ("generate x -o a.png --model .", "has no config.json"),
        ("generate x -o a.png --model text-model", "not of an image family"),
        ("generate x -o a.png --model broken", "cannot be read"),
        ("generate x -o missing/a.png MODEL", "cannot write to the folder 'missing'"),
        ("generate x -o empty.txt/a.png MODEL", "cannot write to the folder 'empty.txt'"),
        ("generate x -o a.jpg MODEL", "must be a .png file or a folder"),
        ("generate x -o a.png MODEL --guidance-scale 0", "guidance_scale must be a number greater than 0"),
        ("generate x -o a.png MODEL --guidance-scale -1", "guidance_scale must be"),
        ("generate x -o a.png MODEL --guidance-scale nan", "guidance_scale must be"),
        ("generate x -o a.png MODEL --guidance-scale strong", "invalid float value: 'strong'"),
        ("generate x -o a.png MODEL --num-speculative-tokens 129", "whole number from 0 to 128; got 129"),
        ("generate x -o a.png MODEL --num-speculative-tokens -1", "whole number from 0 to 128; got -1"),
        ("generate x -o a.png MODEL --redraft couple", "Did you mean 'coupled'"),
        ("generate x -o a.png MODEL --first-guess left", "first_guess must be one of uniform, repeat_left"),
        ("generate x -o a.png MODEL --method speculative", "method must be one of sjd, none"),
        ("generate x -o a.png MODEL --n 0", "n must be a whole number from 1"),
        ("generate x -o a.png MODEL --n 1.5", "invalid int value: '1.5'"),
        ("generate x -o a.png MODEL --seed -4", "seed must be"),
        ("generate x -o a.png MODEL --size 40x40", "size must be one of 36x36"),
        ("generate x -o a.png MODEL --temperature -1", "temperature must be"),
        ("generate x -o a.png MODEL --top-k -1", "top_k must be"),
        ("generate x -o a.png MODEL --top-p 2", "top_p must be"),
        ("generate x -o a.png MODEL --batch-size 0", "batch_size must be"),
        ("generate x -o a.png MODEL --guidance 3", "unknown argument '--guidance'. Did you mean '--guidance-scale'"),
        ("bench MODEL --prompts 0", "prompts must be a whole number from 1"),
        ("bench MODEL --concurrency 1,two", "whole numbers separated by commas; got '1,two'"),
        ("bench MODEL --concurrency 0", "concurrency must be"),
        ("bench MODEL --guidance-scale 0", "guidance_scale must be"),
        ("bench MODEL --output-row missing/rows.csv", "cannot write rows to 'missing/rows.csv'"),
        ("serve MODEL --port 0", "port must be a whole number from 1"),
        ("serve MODEL --port http", "invalid int value: 'http'"),
        ("serve MODEL --max-batch-size 0", "max_batch_size must be"),
        ("serve MODEL --num-speculative-tokens 129", "whole number from 0 to 128; got 129"),
        ("serve MODEL --redraft couple", "Did you mean 'coupled'"),
        ("serve MODEL --first-guess left", "first_guess must be one of uniform"),
        ("serve MODEL --prot 8001", "unknown argument '--prot'. Did you mean '--port'"),
        ("serve MODEL --max-num-seqs 4", "Flags of `vllm serve` go behind -- at the end"),
        ("serve --model missing", "'missing' is not a folder"),
        ("serve --model text-model", "not of an image family"),
        ("demo-prompts 0", "N must be a whole number from 1"),
        ("demo-prompts many", "invalid int value: 'many'"),
    ],
)
def test_one_line_and_exit_code_2(painter: Path, capfd: pytest.CaptureFixture[str], line: str, said: str) -> None:
    code = main(shlex.split(line.replace("MODEL", f"--model {shlex.quote(str(painter))}")))
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("sjd-vllm: error: ")
    assert err.count("\n") == 1
    assert said in err


def test_nothing_is_written_for_bad_input(painter: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["generate", "x", "-o", "a.png", "--model", str(painter), "--guidance-scale", "0"]) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "-o", "a.png", "--guidance-scale", "0"],
        ["generate", "x", "-o", "a.png", "--model", "missing"],
        ["generate", "x", "-o", "missing/a.png"],
    ],
)
def test_the_installed_command_says_the_same(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("sjd-vllm: error: ")
    assert done.stderr.count("\n") == 1


def test_settings_are_checked_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from sjd_vllm.cli import main;"
        "code = main(['generate', 'x', '-o', 'a.png', '--top-p', '2']);"
        "sys.exit(code if not {'torch', 'vllm', 'transformers'} & sys.modules.keys() else 3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2


def test_demo_prompts_are_the_same_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for seed in ("1", "1", "2"):
        assert main(["demo-prompts", "5", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert len(printed[0].splitlines()) == 5
    assert all(printed[0].splitlines())


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"set -o pipefail; {shlex.quote(COMMAND)} demo-prompts 100000 | head -n 1",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
