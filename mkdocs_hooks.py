"""The site is built of docs/ and of what docs/ links to elsewhere in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
# Taken into the site, under the same path.
_MORE = ("benchmarks/README.md", "benchmarks/gpu/README.md", "benchmarks/results/*")
_IN_REPOSITORY = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Entries of the navigation whose page has not been written yet are left out."""
    config.nav = _existing(config.nav)
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add what lies outside docs/."""
    for pattern in _MORE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links that are right in the repository become right in the site; those to its code become their text.

    A link to what is nowhere is left as it is, and fails a strict build.
    """
    if page.file.src_uri in _MORE:
        return markdown

    def replaced(match: re.Match[str]) -> str:
        text, path, anchor = match.group(1), match.group(2), match.group(3) or ""
        if path == "README.md":
            return f"[{text}](index.md)"
        if path.startswith("benchmarks/") and any((ROOT / path).match(pattern) for pattern in _MORE):
            return f"[{text}]({path}{anchor})"
        if path.startswith("benchmarks/results") and (ROOT / path).is_dir():
            return f"[{text}](benchmarks/README.md)"
        return text if (ROOT / path).exists() else match.group(0)

    return _IN_REPOSITORY.sub(replaced, markdown)


def _existing(entries: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for entry in entries:
        (title, target), *_ = entry.items()
        if isinstance(target, list):
            kept.append({title: _existing(target)})
        elif (ROOT / "docs" / target).is_file() or (ROOT / target).is_file():
            kept.append(entry)
    return kept
