"""The site builds strictly, the notebook runs, examples in docstrings are right."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import sjd_vllm
import sjd_vllm.core
import sjd_vllm.evaluation
import sjd_vllm.models
from notebook_cells import run_cells

ROOT = Path(__file__).parent.parent
PYTHON_BIN = Path(sys.executable).parent


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(PYTHON_BIN / "mkdocs"), "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    written = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert written <= pages
    # what the pages link to outside of docs/ is there
    assert (tmp_path / "site" / "benchmarks" / "results" / "forwards.csv").is_file()
    home = (tmp_path / "site" / "index.html").read_text()
    # every page that is written is in the navigation
    assert not [name for name in written if f'href="{name}/"' not in home]


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    """The negative control."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](missing.md)")
    config = (ROOT / "mkdocs.yml").read_text().replace("hooks: [mkdocs_hooks.py]", "").split("nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(config)
    command = [str(PYTHON_BIN / "mkdocs"), "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "missing.md" in done.stderr


def test_the_notebook_runs() -> None:
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text())
    outputs = run_cells(notebook)
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]

    def kinds(cells: list[list[dict[str, object]]]) -> list[list[object]]:
        return [[output["output_type"] for output in cell] for cell in cells]

    assert kinds(outputs) == kinds(stored), "run `python tests/notebook_cells.py docs/tour.ipynb`"
    # how many forwards drafts take may differ in the last bits of a machine's arithmetic; that they save some may not
    plain, drafted = (json.loads(line.split("]")[0] + "]") for line in outputs[1][0]["text"].splitlines())
    assert plain == [273] * 4
    assert max(drafted) < 273 / 2


def _modules() -> list[str]:
    names = []
    for package in (sjd_vllm.core, sjd_vllm.evaluation, sjd_vllm.models):
        names += [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return [*names, "sjd_vllm.config", "sjd_vllm.images.rows", "sjd_vllm.images.bench"]


def test_examples_in_docstrings() -> None:
    results = {}
    for module_name in _modules():
        if module_name.endswith((".model", ".vq")):
            continue  # imported by vLLM only
        results[module_name] = doctest.testmod(importlib.import_module(module_name))
    assert not {module: result for module, result in results.items() if result.failed}
    assert sum(result.attempted for result in results.values()) >= 10
