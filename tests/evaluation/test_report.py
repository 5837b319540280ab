"""The page about a run: every section, every figure, nothing from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sjd_vllm.cli import main
from sjd_vllm.evaluation.page import Card, Figure, Page, Section, Table, Text

LOAD_CURVE = Path(__file__).parents[2] / "benchmarks" / "results" / "load_curve.csv"


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    folder = tmp_path_factory.mktemp("report")
    assert (
        main(["report", str(finished), "-o", str(folder), "--load-curve", str(LOAD_CURVE), "--note", "By hand."]) == 0
    )
    return (folder / "report.html").read_text(), (folder / "report.md").read_text(), folder


def test_every_section_is_there(pages: tuple[str, str, Path]) -> None:
    html, markdown, _ = pages
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "At a glance",
        "The paper&#x27;s table, with our rows",
        "The same prompts and seeds",
        "Forward by forward",
        "Where drafts are accepted",
        "Losslessness",
        "Pictures of two methods",
        "Latency and throughput",
    ]
    assert len(re.findall(r"^## ", markdown, re.MULTILINE)) == len(titles)
    assert "By hand." in html
    assert "24 / 24" in html  # gumbel's pictures that are plain decoding's
    assert "SJD++" in html


def test_the_page_needs_nothing_else(pages: tuple[str, str, Path]) -> None:
    html, markdown, folder = pages
    assert not re.findall(r'(?:src|href)="(?!data:|#|https://arxiv\.org)', html)
    assert "<script" not in html
    sources = re.findall(r'src="data:image/(svg\+xml|webp);base64,([^"]+)"', html)
    assert len(sources) >= 6
    files = {path.name: path.read_bytes() for path in (folder / "report-files").iterdir()}
    assert sorted(base64.b64decode(data) for _, data in sources) == sorted(files.values())
    linked = re.findall(r"\]\(report-files/([^)]+)\)", markdown)
    assert sorted(linked) == sorted(files)


def test_windows_of_another_run_are_drawn(
    finished: Path, evaluate: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = Path(__file__).parent / "samples"
    arguments = ["--suite", "t2i-compbench", str(samples / "t2i"), "--n", "2", "--batch-size", "4"]
    run = tmp_path / "windows"
    assert evaluate(*arguments, "--methods", "coupled", "--windows", "2,8", "-o", str(run)) == 0
    assert "BLIP_vqa.py" in capfd.readouterr().out
    assert main(["report", str(finished), str(run), "-o", str(tmp_path)]) == 0
    assert "Compression by window" in (tmp_path / "report.html").read_text()
    # T2I-CompBench++: a folder a category, PROMPT_NNNNNN.png numbered through it
    laid = {
        path.relative_to(run / "for-scorers" / "coupled@2").as_posix() for path in run.glob("for-scorers/*2/**/*.png")
    }
    assert laid == {
        f"{category}/samples/{prompt}_{number:06d}.png"
        for category, prompts in {
            "color": ["a red house at a blue lake", "a blue house at night"],
            "spatial": ["a house at a lake", "a lake at a house"],
        }.items()
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(2))
    }


def test_markup_is_escaped_and_cells_stay_cells() -> None:
    page = Page(
        "a < b",
        "`x|y` and **z**",
        [
            Section(
                "S", [Text("<i>"), Table(["h|"], [["c|"]]), Figure("f", "svg", b"<svg/>", "seen"), [Card("1", "m")]]
            ),
        ],
    )
    html = page.to_html()
    assert "<i>" not in html
    assert "<title>a &lt; b</title>" in html
    assert "<code>x|y</code> and <strong>z</strong>" in html
    assert "| c\\| |" in page.to_markdown("figures")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "holds no run of `sjd-vllm eval`"),
        (["RUN", "--load-curve", "missing.csv"], "cannot read 'missing.csv'"),
        (["RUN", "-o", "/dev/null/x"], "cannot write to '/dev/null/x'"),
    ],
)
def test_bad_input_is_one_line(
    finished: Path, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *[str(finished) if a == "RUN" else a for a in arguments]]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert err.count("\n") == 1
