"""What the next vLLM release would change under this package: `make next-vllm`.

The contract is `sjd_vllm.engine.compat.PRIVATE_NAMES`: every class and method of vLLM's insides in use. A wheel of the
other release is downloaded. First it is read: its source is parsed, each name is looked up there and in the vLLM of
this environment, and what differs is told, from a changed body (read it) to a name that is gone (this package would not
start). Then the contract tests run on it, in a process that has its Python files in front of this environment's vLLM,
with this environment's other packages and those that the release requires and a test misses: every name must resolve,
and every way to ask for this plugin must give an engine's config. No engine starts, so compiled code is not needed, and
the wheel may be one for GPUs.

Exit code: 0 no name is gone, no signature has changed and the tests pass, 1 otherwise, 2 there is nothing to compare.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sjd_vllm.engine.compat import PRIVATE_NAMES, SUPPORTED_VLLM, PrivateName

CONTRACT_TESTS = ("tests/engine/test_compat.py", "tests/test_plugin.py")
_REPOSITORY = Path(__file__).resolve().parent.parent
_TEST_SECONDS = 900
_MISSING_MODULE = re.compile(r"No module named '(\w+)'")
# The release under test is not the one that is supported, and the plugin would refuse it.
_RUN_TESTS = """
import sys
import pytest
from sjd_vllm.engine import compat
compat.SUPPORTED_VLLM = sys.argv[1]
sys.exit(pytest.main(sys.argv[2:]))
"""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign
# From the name of a module to its source; None where there is no such module.
Source = Callable[[str], str | None]


@dataclass(frozen=True)
class Finding:
    """One private name in two releases.

    Attributes:
        state: "gone", "signature" (other arguments or bases), "body" (other code) or "same".
        detail: the difference as text; empty for "same".
    """

    private: PrivateName
    state: str
    detail: str


def compare(ours: Source, theirs: Source, names: tuple[PrivateName, ...] = PRIVATE_NAMES) -> list[Finding]:
    """Look every name up in both. Raises LookupError for a name that our own release lacks."""
    findings = []
    for private in names:
        mine = find(ours, private.module, private.name)
        if mine is None:
            raise LookupError(f"{private.module}.{private.name} is not in the vLLM of this environment")
        other = find(theirs, private.module, private.name)
        findings.append(_finding(private, mine, other))
    return findings


def find(source: Source, module: str, name: str) -> Definition | None:
    """The class, function or variable behind a dotted name; methods are also looked for in base classes and imports."""
    tree = _parsed(source, module)
    if tree is None:
        return None
    first, *rest = name.split(".")
    for node in ast.walk(tree):
        if isinstance(node, Definition) and _name(node) == first:
            return node if not rest else _member(source, module, node, rest[0])
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == first:
                    return find(source, node.module, ".".join([alias.name, *rest]))
    return None


def _name(node: Definition) -> str:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    return node.name


def _member(source: Source, module: str, owner: Definition, name: str) -> Definition | None:
    for node in getattr(owner, "body", []):
        if isinstance(node, Definition) and _name(node) == name:
            return node
    for base in getattr(owner, "bases", []):
        if isinstance(base, ast.Subscript):
            base = base.value
        if isinstance(base, ast.Name) and (found := find(source, module, f"{base.id}.{name}")) is not None:
            return found
    return None


@functools.cache
def _parsed(source: Source, module: str) -> ast.Module | None:
    text = source(module)
    return None if text is None else ast.parse(text)


def _finding(private: PrivateName, mine: Definition, other: Definition | None) -> Finding:
    if other is None:
        return Finding(private, "gone", "")
    heads = [_head(node) for node in (mine, other)]
    if heads[0] != heads[1]:
        return Finding(private, "signature", f"{heads[0]}\n{heads[1]}")
    # A class that we construct or derive from: its own interface is the contract, not every line of it.
    bodies = [_outline(node) if isinstance(node, ast.ClassDef) else ast.unparse(node) for node in (mine, other)]
    if bodies[0] != bodies[1]:
        difference = difflib.unified_diff(
            bodies[0].splitlines(), bodies[1].splitlines(), "ours", "theirs", "", "", 2, ""
        )
        return Finding(private, "body", "\n".join(difference))
    return Finding(private, "same", "")


def _head(node: Definition) -> str:
    if isinstance(node, ast.Assign):
        return f"{_name(node)} ="
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}({', '.join(ast.unparse(base) for base in node.bases)})"
    return f"def {node.name}({ast.unparse(node.args)})"


def _outline(node: ast.ClassDef) -> str:
    return "\n".join(_head(member) for member in node.body if isinstance(member, Definition))


def installed() -> Source:
    """The vLLM of this environment."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise LookupError("there is no vLLM in this environment")
    root = Path(spec.origin).parent.parent

    def source(module: str) -> str | None:
        for path in (root / (module.replace(".", "/") + ".py"), root / module.replace(".", "/") / "__init__.py"):
            if path.is_file():
                return path.read_text(encoding="utf-8")
        return None

    return source


def wheel(path: Path) -> Source:
    """A wheel file."""
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())

    def source(module: str) -> str | None:
        for name in (module.replace(".", "/") + ".py", module.replace(".", "/") + "/__init__.py"):
            if name in names:
                return archive.read(name).decode("utf-8")
        return None

    return source


def download(version: str | None, folder: str) -> Path:
    """The wheel of a release, by default the newest with pre-releases. Raises LookupError if there is none."""
    wanted = "vllm" if version is None else f"vllm=={version}"
    command = ["pip", "download", "--quiet", "--pre", "--no-deps", "--only-binary", ":all:", "--dest", folder, wanted]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 42)] + ["manylinux1_x86_64"]
    command += [part for platform in platforms for part in ("--platform", platform)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    found = list(Path(folder).glob("*.whl"))
    if not found:
        raise LookupError(f"no wheel of {wanted}: {done.stderr.strip().splitlines()[-1:]}")
    return found[0]


def lay_out(path: Path, version: str, folder: Path) -> None:
    """A wheel's package without compiled files, under the metadata by which vLLM takes itself for its CPU build."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and not name.endswith(".so"):
                archive.extract(name, folder)
    metadata = folder / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def requirements(path: Path) -> dict[str, str]:
    """What a wheel requires, without its extras: name as modules are mostly called -> requirement as pip takes it."""
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(found[0]).decode().splitlines() if found else []
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    wanted = [line.split(";")[0].strip() for line in asked if "extra ==" not in line]
    return {re.split(r"[^A-Za-z0-9._-]", one)[0].lower().replace("-", "_"): one for one in wanted}


def run_tests(
    folder: Path, version: str, required: Mapping[str, str], tests: tuple[str, ...] = CONTRACT_TESTS
) -> tuple[bool, str]:
    """Whether the contract tests pass on the vLLM in a folder, and pytest's summary, or what else they said.

    A package that this release requires, and that a test does not find here, is put into the folder first.
    """
    release = ".".join(version.split(".")[:2])
    searched = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-c", _RUN_TESTS, release, "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider", *tests]
    added: set[str] = set()
    while True:
        done = subprocess.run(
            command,
            cwd=_REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(searched), "COLUMNS": "240"},
            capture_output=True,
            text=True,
            timeout=_TEST_SECONDS,
        )
        lacking = set(_MISSING_MODULE.findall(done.stdout)) & required.keys() - added
        if not lacking:
            break
        added |= lacking
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*install, *(required[name] for name in sorted(lacking))], check=True, capture_output=True)
    lines = done.stdout.splitlines()
    kept = [line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:]
    kept += [f"with {name}, which this environment lacks" for name in sorted(added)]
    return done.returncode == 0, "\n".join(kept or done.stderr.splitlines()[-20:])


def report(findings: list[Finding], other: str) -> str:
    """Markdown: a line a name, the differences behind."""
    lines = [f"# vLLM {SUPPORTED_VLLM} against {other}", "", "| name | used for | state |", "|---|---|---|"]
    lines += [f"| `{f.private.module}.{f.private.name}` | {f.private.reason} | {f.state} |" for f in findings]
    for finding in findings:
        if finding.detail:
            lines += ["", f"## {finding.private.name}: {finding.state}", "", "```diff", finding.detail, "```"]
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="release to compare with (the newest)")
    parser.add_argument("--wheel", type=Path, help="a wheel that is here already")
    parser.add_argument("--no-tests", action="store_true", help="compare the source alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = given.wheel or download(given.version, folder)
            findings = compare(installed(), wheel(path))
        except (LookupError, OSError, zipfile.BadZipFile) as error:
            print(f"next_vllm.py: error: {error}", file=sys.stderr)
            return 2
        version = path.name.split("-")[1].split("+")[0]
        print(report(findings, version), flush=True)
        passed = True
        if not given.no_tests:
            laid_out = Path(folder) / "laid-out"
            laid_out.mkdir()
            lay_out(path, version, laid_out)
            passed, summary = run_tests(laid_out, version, requirements(path))
            print(f"\n## Contract tests on {version}: {'passed' if passed else 'FAILED'}\n\n```\n{summary}\n```")
    return int(not passed or any(finding.state in ("gone", "signature") for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
