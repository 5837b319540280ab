"""Prompt suites, read in the formats in which their authors publish them.

| suite | file | format |
|---|---|---|
| geneval | evaluation_metadata.jsonl | a JSON object a line: tag, include, exclude, prompt |
| t2i-compbench | color_val.txt, ... or their folder | a prompt a line, the category in the file's name |
| coco | captions_val2014.json, captions_val2017.json | the first caption of each picture is taken |
| parti | PartiPrompts.tsv | Prompt, Category, Challenge, Note, tab-separated and without quoting |
| prompts | any text file | a prompt a line |
| demo | none | captions of the demo model's landscapes, with the attributes that its scorer reads |

Published in djghosh13/geneval, Karine-Huang/T2I-CompBench, COCO's annotations and google-research/parti.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjd_vllm.config import ConfigError, check_choice


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        index: its place in the published order, which layouts and seeds are counted by.
        text: what the model is asked for.
        category: the suite's own grouping; "" if it has none.
        source: what else the suite says about it, as plain JSON types.
    """

    index: int
    text: str
    category: str
    source: dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Prompts and how many pictures of each their authors score."""

    name: str
    prompts: list[SuitePrompt]
    images_per_prompt: int


_IMAGES_PER_PROMPT = {"demo": 1, "geneval": 4, "t2i-compbench": 10, "coco": 1, "parti": 1, "prompts": 1}
SUITE_NAMES = tuple(_IMAGES_PER_PROMPT)
# What demo captions cost nothing of: without --limit the suite must still end.
_DEMO_LIMIT = 64


def read_suite(name: str, files: Sequence[str], *, limit: int | None = None, seed: int = 0) -> Suite:
    """Read a suite.

    Args:
        name: one of SUITE_NAMES.
        files: what the table above names; none for demo.
        limit: so many prompts, spread evenly over the suite, so that every category is among them.
        seed: of the demo captions.

    Raises ConfigError for a missing file, or one that is not in the suite's format; it names the line.
    """
    check_choice("suite", name, SUITE_NAMES)
    if name == "demo":
        if files:
            raise ConfigError("suite", f"the suite demo takes no file; got {files[0]!r}.")
        prompts = _demo(limit or _DEMO_LIMIT, seed)
    else:
        if not files:
            raise ConfigError("suite", f"the suite {name} needs its file: --suite {name} FILE.")
        if len(files) > 1 and name != "t2i-compbench":
            raise ConfigError("suite", f"the suite {name} takes one file; got {len(files)}.")
        prompts = [
            SuitePrompt(index, *entry) for index, entry in enumerate(e for file in files for e in _READERS[name](file))
        ]
        if not prompts:
            raise ConfigError("suite", f"no prompts in {', '.join(files)}.")
    return Suite(name, _spread(prompts, limit), _IMAGES_PER_PROMPT[name])


def _spread(prompts: list[SuitePrompt], limit: int | None) -> list[SuitePrompt]:
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def _demo(count: int, seed: int) -> list[SuitePrompt]:
    from sjd_vllm.demo.captions import captioned_scenes

    return [
        SuitePrompt(index, caption, scene.ground, {"labels": scene.labels()})
        for index, (scene, caption) in enumerate(captioned_scenes(count, seed))
    ]


_Entry = tuple[str, str, dict[str, Any]]  # text, category, source


def _geneval(file: str) -> list[_Entry]:
    entries = []
    for number, line in _lines(file):
        try:
            source = json.loads(line)
            entries.append((_text(source["prompt"]), _text(source["tag"]), source))
        except (ValueError, KeyError, TypeError) as error:
            raise _bad(file, number, "a JSON object with tag, include and prompt", error) from error
    return entries


def _t2i_compbench(file: str) -> list[_Entry]:
    path = Path(file)
    if path.is_dir():
        files = sorted(path.glob("*_val.txt"))
        if not files:
            raise ConfigError("suite", f"the folder {file!r} has no files named CATEGORY_val.txt.")
        return [entry for each in files for entry in _t2i_compbench(str(each))]
    category = path.stem.removesuffix("_val")
    # Some of the authors' files have more columns behind a tab; their own scripts take the first.
    return [(line.split("\t")[0].strip(), category, {}) for _, line in _lines(file)]


def _coco(file: str) -> list[_Entry]:
    try:
        content = json.loads(_read(file))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        first: dict[int, dict[str, Any]] = {}
        for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
            first.setdefault(annotation["image_id"], annotation)
        return [
            (_text(" ".join(first[image]["caption"].split())), "", {"image_id": image, "file_name": names[image]})
            for image in sorted(first)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(
            file, None, "COCO's captions: images with id and file_name, annotations with caption", error
        ) from error


def _parti(file: str) -> list[_Entry]:
    rows = csv.reader(io.StringIO(_read(file)), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(rows, [])
    if header[:3] != ["Prompt", "Category", "Challenge"]:
        raise _bad(file, 1, "a header of Prompt, Category, Challenge, Note, tab-separated", "another header")
    entries = []
    for number, row in enumerate(rows, 2):
        if not any(row):
            continue
        if len(row) < 3 or not row[0].strip():
            raise _bad(file, number, "Prompt, Category, Challenge, Note, tab-separated", f"{len(row)} columns")
        entries.append((row[0].strip(), row[1], {"challenge": row[2]}))
    return entries


def _plain(file: str) -> list[_Entry]:
    return [(line, "", {}) for _, line in _lines(file)]


_READERS: dict[str, Callable[[str], list[_Entry]]] = {
    "geneval": _geneval,
    "t2i-compbench": _t2i_compbench,
    "coco": _coco,
    "parti": _parti,
    "prompts": _plain,
}


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("suite", f"cannot read prompts from {file!r}: {error}") from error


def _lines(file: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    return [(number, line.strip()) for number, line in enumerate(_read(file).splitlines(), 1) if line.strip()]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r} is not text")
    return value.strip()


def _bad(file: str, number: int | None, expected: str, found: object) -> ConfigError:
    place = file if number is None else f"{file}, line {number}"
    return ConfigError("suite", f"{place}: expected {expected}; got {found}.")
