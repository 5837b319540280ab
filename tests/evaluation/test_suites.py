"""Suites are read as their authors publish them; a broken file is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sjd_vllm.config import ConfigError
from sjd_vllm.demo.captions import captions
from sjd_vllm.evaluation.suites import read_suite

SAMPLES = Path(__file__).parent / "samples"


def test_geneval_keeps_the_whole_line() -> None:
    suite = read_suite("geneval", [str(SAMPLES / "evaluation_metadata.jsonl")])
    assert suite.images_per_prompt == 4
    assert [(p.index, p.text, p.category) for p in suite.prompts][:2] == [
        (0, "a red house", "single_object"),
        (1, "a house at a lake", "two_object"),
    ]
    lines = (SAMPLES / "evaluation_metadata.jsonl").read_text().splitlines()
    assert [p.source for p in suite.prompts] == [json.loads(line) for line in lines]


def test_t2i_compbench_takes_files_and_their_folder() -> None:
    folder = read_suite("t2i-compbench", [str(SAMPLES / "t2i")])
    files = read_suite("t2i-compbench", [str(SAMPLES / "t2i" / f"{name}_val.txt") for name in ("color", "spatial")])
    assert folder == files
    assert folder.images_per_prompt == 10
    # carriage returns and further columns fall away, as in the authors' own scripts; training prompts are left out
    assert [(p.text, p.category) for p in folder.prompts] == [
        ("a red house at a blue lake", "color"),
        ("a blue house at night", "color"),
        ("a house at a lake", "spatial"),
        ("a lake at a house", "spatial"),
    ]


def test_coco_takes_the_first_caption_of_each_picture() -> None:
    suite = read_suite("coco", [str(SAMPLES / "captions_val2017.json")])
    assert [(p.text, p.source["image_id"], p.source["file_name"]) for p in suite.prompts] == [
        ("A red house at night", 4, "000000000004.jpg"),
        ("a lake at night", 9, "000000000009.jpg"),
    ]


def test_parti_has_no_quoting() -> None:
    suite = read_suite("parti", [str(SAMPLES / "PartiPrompts.tsv")])
    assert [(p.text, p.category, p.source) for p in suite.prompts] == [
        ("a red house", "Outdoor Scenes", {"challenge": "Basic"}),
        ('A lake. The words "a house" are on it', "Illustrations", {"challenge": "Complex"}),
    ]


def test_prompts_are_lines_and_demo_captions_are_scenes() -> None:
    assert [p.text for p in read_suite("prompts", [str(SAMPLES / "prompts.txt")]).prompts] == [
        "a red house",
        "a lake at night",
    ]
    demo = read_suite("demo", [], limit=5, seed=3)
    assert [p.text for p in demo.prompts] == captions(5, 3)
    assert all(len(p.source["labels"]) == 7 for p in demo.prompts)


def test_a_limit_is_spread_over_the_suite_and_keeps_the_numbers() -> None:
    suite = read_suite("geneval", [str(SAMPLES / "evaluation_metadata.jsonl")], limit=2)
    assert [(p.index, p.category) for p in suite.prompts] == [(0, "single_object"), (2, "counting")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("geneval", '{"tag": "colors", "prompt": "x"}\n{"prompt": "y"}\n', "line 2"),
        ("geneval", '{"tag": "colors", "prompt": ""}\n', "line 1"),
        ("geneval", "a red house\n", "line 1"),
        ("coco", '{"images": []}', "COCO's captions"),
        ("coco", "[1, 2]", "COCO's captions"),
        ("parti", "a red house\n", "line 1"),
        ("parti", "Prompt\tCategory\tChallenge\tNote\nred\tx\n", "line 2"),
        ("prompts", "\n \n", "no prompts"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    file = tmp_path / "suite"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_suite(name, [str(file)])
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("genval", [], "Did you mean 'geneval'"),
        ("geneval", [], "needs its file"),
        ("geneval", ["a", "b"], "takes one file"),
        ("geneval", ["missing.jsonl"], "cannot read"),
        ("demo", ["a"], "takes no file"),
        ("t2i-compbench", [str(SAMPLES)], "no files named CATEGORY_val.txt"),
    ],
)
def test_a_bad_choice_is_told(name: str, files: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_suite(name, files)
