"""Families of other packages, found through an entry point as an installed package has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAMILY = """
from sjd_vllm.models.demo.family import DemoFamily

ARCHITECTURES = {"PaintedLlama": "vllm.model_executor.models.llama:LlamaForCausalLM"}


class PaintedFamily(DemoFamily):
    name = "painted"


def matches(path, config):
    return config.get("model_type") == "painted"


def load(path, config):
    return PaintedFamily(path, config)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder as pip would leave it after installing a package with a family."""
    folder = tmp_path / "site"
    info = folder / "painted-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "painted.py").write_text(FAMILY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: painted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sjd_vllm.families]\npainted = painted\n")
    return folder


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=400, env={**os.environ, "PYTHONPATH": path}
    )


def test_another_packages_family_is_found(site: Path, tmp_path: Path) -> None:
    from sjd_vllm.demo import checkpoint_path

    config = json.loads((checkpoint_path() / "config.json").read_text())
    config["model_type"] = "painted"
    del config["sjd"]["family"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((checkpoint_path() / "model.safetensors").read_bytes())
    done = run(site, "-m", "sjd_vllm.cli", "check", str(tmp_path), "--json")
    assert json.loads(done.stdout)["family"] == "painted", done.stderr


def test_its_model_class_is_told_to_vllm(site: Path) -> None:
    program = (
        "from sjd_vllm.plugin import register; register(); register(); from vllm import ModelRegistry; "
        "print('PaintedLlama' in ModelRegistry.get_supported_archs())"
    )
    done = run(site, "-c", program)
    assert done.stdout.strip().endswith("True"), done.stderr


@pytest.mark.parametrize(
    ("entry", "source", "said"),
    [
        ("demo", FAMILY, "has the name of one that is known"),
        ("painted", "import nothing_like_it", "cannot be imported"),
    ],
)
def test_a_family_that_cannot_be_used_is_named(site: Path, entry: str, source: str, said: str) -> None:
    (site / "painted.py").write_text(source)
    (site / "painted-1.0.dist-info" / "entry_points.txt").write_text(f"[sjd_vllm.families]\n{entry} = painted\n")
    done = run(site, "-m", "sjd_vllm.cli", "check", str(site))
    assert done.returncode == 1
    assert f"the family '{entry}' of painted" in done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
