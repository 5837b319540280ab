"""What the next vLLM release would change under this package: `make next-vllm`.

The contract is `sjd_vllm.engine.compat.PRIVATE_NAMES`: every class and method of vLLM's insides in use. A wheel of the
other release is downloaded and read, not installed or imported: its source is parsed, each name is looked up there and
in the vLLM of this environment, and what differs is told, from a changed body (read it) to a name that is gone (this
package would not start).

Exit code: 0 no name is gone and no signature has changed, 1 one is, 2 there is nothing to compare.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sjd_vllm.engine.compat import PRIVATE_NAMES, SUPPORTED_VLLM, PrivateName

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
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = given.wheel or download(given.version, folder)
            findings = compare(installed(), wheel(path))
        except (LookupError, OSError, zipfile.BadZipFile) as error:
            print(f"next_vllm.py: error: {error}", file=sys.stderr)
            return 2
    print(report(findings, path.name.split("-")[1]))
    return int(any(finding.state in ("gone", "signature") for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
