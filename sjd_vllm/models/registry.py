"""Which family a checkpoint belongs to, and which vLLM model classes the families bring.

A family is a module with

* ``ARCHITECTURES``: vLLM architecture name -> "module:Class" of the model class, may be empty;
* ``matches(path, config)``: whether a checkpoint is of this family, from its folder and its config.json ({} if it
  has none), without reading weights;
* ``load(path, config)``: its `ImageFamily`.

It is light to import: no vLLM, no Transformers, no weights. Other packages add families through the entry point group
``sjd_vllm.families``: a name, and such a module as its value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from sjd_vllm.models.family import ImageFamily

ENTRY_POINT_GROUP = "sjd_vllm.families"

# A folder that fits several is the first one's: the demo says its name, the later ones look at names and files.
_OWN = ("demo", "emu3", "janus", "simplear", "llamagen", "lumina_mgpt2", "lumina_mgpt", "chameleon")


class FamilyModule(Protocol):
    """What a family's module has."""

    ARCHITECTURES: dict[str, str]

    def matches(self, path: Path, config: dict[str, Any]) -> bool: ...

    def load(self, path: Path, config: dict[str, Any]) -> ImageFamily: ...


@cache
def families() -> dict[str, FamilyModule]:
    """All known families by name, our own first. Raises ImportError for a family of another package that is broken."""
    modules: dict[str, Any] = {name: import_module(f"sjd_vllm.models.{name}.family") for name in _OWN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in modules:
            raise ImportError(f"the family {entry.name!r} of {entry.value} has the name of one that is known already")
        try:
            modules[entry.name] = entry.load()
        except Exception as error:
            raise ImportError(f"the family {entry.name!r} of {entry.value} cannot be imported: {error}") from error
    return cast(dict[str, FamilyModule], modules)


def architectures() -> Iterator[tuple[str, str]]:
    """vLLM architecture name and "module:Class" of every model class that a family brings."""
    for module in families().values():
        yield from module.ARCHITECTURES.items()


def load_family(path: str | Path) -> ImageFamily | None:
    """The family of the checkpoint in a folder, or None for a model that is not one of ours (plain text).

    Raises ValueError where the config is unreadable or lacks what the family needs, or names an unknown family.
    """
    path = Path(path)
    config_path = path / "config.json"
    if not path.is_dir():
        return None
    config: dict[str, Any] = {}
    if config_path.is_file():
        try:
            config = json.loads(config_path.read_text())
        except ValueError as error:
            raise ValueError(f"{config_path} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{config_path} holds no object")
    named = (config.get("sjd") or {}).get("family")
    if named is not None:
        if named not in families():
            raise ValueError(f"{config_path} names the family {named!r}; known are {', '.join(families())}.")
        return families()[named].load(path, config)
    for module in families().values():
        if module.matches(path, config):
            return module.load(path, config)
    return None
