"""File names, contact sheets and PNG metadata; no engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sjd_vllm.config import ConfigError
from sjd_vllm.images.output import OutputPaths
from sjd_vllm.images.picture import Picture
from sjd_vllm.images.request import ImageRequest
from sjd_vllm.images.sheet import contact_sheet
from sjd_vllm.models.registry import load_family


def test_one_picture_is_the_named_file(tmp_path: Path) -> None:
    paths = OutputPaths.plan(str(tmp_path / "fox.png"), 1)
    assert paths == OutputPaths([tmp_path / "fox.png"], None)


def test_several_pictures_stand_beside_their_sheet(tmp_path: Path) -> None:
    paths = OutputPaths.plan(str(tmp_path / "fox.png"), 2)
    assert paths == OutputPaths([tmp_path / "fox-1.png", tmp_path / "fox-2.png"], tmp_path / "fox.png")


def test_a_folder_is_made(tmp_path: Path) -> None:
    paths = OutputPaths.plan(str(tmp_path / "out"), 10)
    assert (tmp_path / "out").is_dir()
    assert paths.pictures[0] == tmp_path / "out" / "picture-01.png"
    assert paths.pictures[9] == tmp_path / "out" / "picture-10.png"
    assert paths.sheet == tmp_path / "out" / "contact-sheet.png"
    assert OutputPaths.plan(str(tmp_path / "out"), 1) == OutputPaths([tmp_path / "out" / "picture-1.png"], None)


@pytest.mark.parametrize(
    "output", ["", "missing/fox.png", "missing/out", "file/fox.png", "fox.jpg", "x" * 300 + ".png"]
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        OutputPaths.plan(output, 1)
    assert caught.value.param == "output"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (9, 3, 3)])
def test_a_sheet_holds_every_picture_once(count: int, columns: int, rows: int) -> None:
    colours = [(25 * i + 30, 200, 10) for i in range(count)]
    sheet = contact_sheet([Image.new("RGB", (8, 6), colour) for colour in colours])
    assert sheet.size == (columns * 12 + 4, rows * 10 + 4)
    pixels = list(sheet.getdata())
    assert [pixels.count(colour) for colour in colours] == [48] * count


def test_a_png_tells_how_it_was_made(painter: Path, tmp_path: Path) -> None:
    family = load_family(painter)
    assert family is not None
    prompt = "ein rotes Häuschen 赤い家"
    (request,) = ImageRequest(prompt, seed=7, top_k=5).pictures(family, 128)
    picture = Picture(request, Image.new("RGB", (36, 36)), [1] * 43, tokens_per_step=[2] * 19 + [5], seconds=0.5)
    picture.save(tmp_path / "house.png", model="painter", method="sjd")
    with Image.open(tmp_path / "house.png") as saved:
        text = saved.text  # type: ignore[attr-defined]
    assert text["prompt"] == prompt
    assert text["model"] == "painter"
    assert json.loads(text["seed"]) == 7
    assert json.loads(text["top_k"]) == 5
    assert json.loads(text["guidance_scale"]) == 2.0
    assert json.loads(text["num_steps"]) == 20
    assert json.loads(text["prompt_token_ids"]) == request.prompt_token_ids
    assert text["Software"].startswith("sjd-vllm ")


def test_step_compression_is_tokens_per_forward(painter: Path) -> None:
    family = load_family(painter)
    assert family is not None
    (request,) = ImageRequest("a house").pictures(family, 128)
    picture = Picture(request, Image.new("RGB", (36, 36)), [1] * 43, tokens_per_step=[4] * 10 + [3], seconds=0.5)
    assert picture.counts() == {"num_tokens": 43, "num_steps": 11, "step_compression": 43 / 11, "seconds": 0.5}
