"""Decoding methods as the command line names them: none, gumbel, coupled@16, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sjd_vllm.config import GUMBEL, MAX_WINDOW, REDRAFT_NAMES, ConfigError, check_choice, check_int

PLAIN = "none"
BIASED = "reuse_biased"


@dataclass(frozen=True)
class Method:
    """One way to decode.

    Attributes:
        label: what was asked for, which files and rows are named by.
        name: "none" or one of REDRAFT_NAMES.
        window: draft tokens; 0 under "none".
    """

    label: str
    name: str
    window: int

    @property
    def is_plain(self) -> bool:
        """Whether nothing is drafted."""
        return self.name == PLAIN

    @property
    def draws_as_plain(self) -> bool:
        """Whether a seed's picture is that of plain decoding, since both have the same fixed noise."""
        return self.name in (PLAIN, GUMBEL)

    @property
    def is_exact(self) -> bool:
        """Whether the method keeps the model's distribution."""
        return self.name != BIASED

    def settings(self, first_guess: str | None) -> dict[str, Any]:
        """Fields of `ImageRequest`."""
        if self.is_plain:
            return {"method": "none"}
        return {
            "method": "sjd",
            "redraft": self.name,
            "num_speculative_tokens": self.window,
            "first_guess": None if self.name == GUMBEL else first_guess,
        }


def parse_methods(text: str, window: int, windows: Sequence[int] = ()) -> list[Method]:
    """Methods from a comma-separated list of NAME or NAME@WINDOW.

    Args:
        text: the list.
        window: of a name that says none.
        windows: if given, each name without a window stands for one method at each of these.

    Raises ConfigError for an unknown name, a window out of range, or the same method twice.

    >>> [(method.label, method.window) for method in parse_methods("none,gumbel,coupled@16", 32)]
    [('none', 0), ('gumbel', 32), ('coupled@16', 16)]
    >>> [method.label for method in parse_methods("none,gumbel", 32, windows=[8, 64])]
    ['none', 'gumbel@8', 'gumbel@64']
    """
    methods: list[Method] = []
    for part in (part.strip() for part in text.split(",")):
        name, at, digits = part.partition("@")
        check_choice("methods", name, (PLAIN, *REDRAFT_NAMES))
        if at and not digits.isdecimal():
            raise ConfigError("methods", f"a window is a whole number from 1 to {MAX_WINDOW}; got {part!r}.")
        if name == PLAIN:
            if at:
                raise ConfigError("methods", f"none has no window; got {part!r}.")
            methods.append(Method(name, name, 0))
        elif at:
            methods.append(Method(part, name, int(digits)))
        elif windows:
            methods.extend(Method(f"{name}@{each}", name, each) for each in windows)
        else:
            methods.append(Method(name, name, window))
    for method in methods:
        if not method.is_plain:
            check_int("methods", method.window, 1, MAX_WINDOW)
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise ConfigError("methods", f"each method can stand once in the list; got {text!r}.")
    return methods
