"""The comparison with another vLLM release sees what has moved, in a wheel made of the installed one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from sjd_vllm.engine.compat import PRIVATE_NAMES

SCRIPT = Path(__file__).parent.parent / "requirements" / "next_vllm.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("next_vllm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["next_vllm"] = module
    spec.loader.exec_module(module)
    return module


def _wheel(path: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """The installed vLLM's Python files, with one replacement in some of them."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    with zipfile.ZipFile(path, "w") as archive:
        for file in root.rglob("*.py"):
            name = file.relative_to(root.parent).as_posix()
            text = file.read_text(encoding="utf-8")
            if name in changes:
                assert changes[name][0] in text
                text = text.replace(*changes[name])
            archive.writestr(name, text)
    return path


def test_the_same_release_has_no_differences(script: ModuleType, tmp_path: Path) -> None:
    findings = script.compare(script.installed(), script.wheel(_wheel(tmp_path / "vllm-9.9-py3-none-any.whl", {})))
    assert [finding.private for finding in findings] == list(PRIVATE_NAMES)
    assert {finding.state for finding in findings} == {"same"}


def test_what_has_moved_is_told(tmp_path: Path) -> None:
    changes = {
        "vllm/v1/core/sched/scheduler.py": ("def _preempt_request(", "def _evict_request("),
        "vllm/v1/worker/gpu_model_runner.py": (
            "def _input_fits_in_drafter(\n        self,",
            "def _input_fits_in_drafter(\n        self, more,",
        ),
    }
    wheel = _wheel(tmp_path / "vllm-9.9.1-cp38-abi3-linux.whl", changes)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--no-tests", "--wheel", str(wheel)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    states = {
        line.split("`")[1].rsplit(".", 1)[1]: line.split("|")[-2].strip()
        for line in done.stdout.splitlines()
        if line.startswith("| `")
    }
    assert states.pop("_preempt_request") == "gone"
    assert states.pop("_input_fits_in_drafter") == "signature"
    # a method whose body calls the one that was renamed is worth reading too
    assert set(states.values()) <= {"same", "body"}
    assert "against 9.9.1" in done.stdout


def test_the_contract_tests_run_on_what_the_wheel_holds(script: ModuleType, tmp_path: Path) -> None:
    """One method has moved there: its test fails, and all others pass on that release."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    wheel, root, folder = tmp_path / "vllm-9.9.1-cp38-abi3-linux.whl", Path(spec.origin).parent, tmp_path / "laid-out"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in root.rglob("*"):
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                archive.write(file, file.relative_to(root.parent))
    script.lay_out(wheel, "9.9.1", folder)
    (folder / "vllm/_version.py").write_text("__version__ = '9.9.1'\n__version_tuple__ = (9, 9, 1)\n")
    scheduler = folder / "vllm/v1/core/sched/scheduler.py"
    scheduler.write_text(scheduler.read_text().replace("def _preempt_request(", "def _evict_request("))
    passed, summary = script.run_tests(folder, "9.9.1", {})
    assert not passed
    failed, counts = summary.splitlines()
    assert "Scheduler._preempt_request" in failed
    assert counts.startswith("1 failed, ")
    assert int(counts.split()[2]) > len(PRIVATE_NAMES)


def test_requirements_are_those_without_extras(script: ModuleType, tmp_path: Path) -> None:
    metadata = (
        "Name: vllm\nRequires-Dist: orjson>=3.9\nRequires-Dist: mcp<3.0.0,>=2.2.0\n"
        'Requires-Dist: typing-extensions>=4; python_version < "3.13"\nRequires-Dist: pandas; extra == "bench"\n'
    )
    wheel = tmp_path / "vllm-9.9.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm-9.9.1.dist-info/METADATA", metadata)
    assert script.requirements(wheel) == {
        "orjson": "orjson>=3.9",
        "mcp": "mcp<3.0.0,>=2.2.0",
        "typing_extensions": "typing-extensions>=4",
    }


def test_a_missing_wheel_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--wheel", "missing.whl"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "missing.whl" in done.stderr
