"""Imports point downwards only, and the core knows torch, with its numpy, and nothing else."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sjd_vllm"
# What each folder may import of the others; anything may import config.
ALLOWED = {
    "core": set(),
    "models": set(),
    "demo": {"models"},
    "engine": {"core", "models"},
    "images": {"models", "demo"},
    "evaluation": {"core", "models", "demo", "images"},
    "deploy": {"images", "models", "demo", "engine"},
}
# Run by hand and imported by nobody, so it stands above all folders.
PROGRAMS = {"demo/evaluate.py"}


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    return _imports_of(path.read_text(), ("sjd_vllm", *path.relative_to(PACKAGE).parts[:-1]))


def _imports_of(source: str, package: tuple[str, ...]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from sjd_vllm import engine` names a folder too.
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "sjd_vllm" else {module}
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    if folder not in ALLOWED or str(path.relative_to(PACKAGE)) in PROGRAMS:
        return  # plugin.py, config.py and __init__.py stand beside the folders
    for name in _imports(path):
        parts = name.split(".")
        assert "/".join(parts[1:]) + ".py" not in PROGRAMS, f"{name} is a program; nothing may import it"
        if parts[0] == "sjd_vllm" and len(parts) > 1 and parts[1] in ALLOWED:
            assert parts[1] in ALLOWED[folder] | {folder}, f"{folder} must not import {name}"


def test_core_knows_torch_with_its_numpy_and_nothing_else() -> None:
    for path in sorted((PACKAGE / "core").glob("*.py")):
        for name in _imports(path):
            top = name.split(".")[0]
            is_own = name.startswith("sjd_vllm.core")
            assert is_own or top in ("torch", "numpy") or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_only_the_engine_and_the_plugin_know_the_insides_of_vllm() -> None:
    """Elsewhere vLLM's public names alone are used; what its command `vllm` runs, and its registry of config parsers.

    A family's model class is built of vLLM's layers, as every class outside of vLLM's tree is.
    """
    public = (
        "vllm",
        "vllm.sampling_params",
        "vllm.platforms",
        "vllm.distributed",
        "vllm.exceptions",
        "vllm.entrypoints.cli.main",
        "vllm.transformers_utils.config",
        "vllm.transformers_utils.config_parser_base",
    )
    for path in _modules():
        relative = path.relative_to(PACKAGE)
        is_model = relative.parts[0] == "models" and relative.name == "model.py"
        if relative.parts[0] == "engine" or relative.name in ("plugin.py", "runner_choice.py") or is_model:
            continue
        for name in _imports(path):
            assert name.split(".")[0] != "vllm" or name in public, f"{relative} imports {name}"


def test_every_form_of_import_is_seen() -> None:
    """The negative control: the tests above would notice these."""
    source = """
def late():
    from sjd_vllm.engine.worker import SJDCPUWorker
    from sjd_vllm import models
    from ..images import cli
    import vllm.v1
"""
    found = _imports_of(source, ("sjd_vllm", "core"))
    assert found == {"sjd_vllm.engine.worker", "sjd_vllm.models", "sjd_vllm.images", "vllm.v1"}
