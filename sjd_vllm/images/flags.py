"""Command-line flags: made from the fields of ImageRequest, with one-line errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sjd_vllm.config import ConfigError, nearest_name
from sjd_vllm.images.request import ImageRequest


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError with one line instead of printing its usage and exiting."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError("arguments", message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, and names the flag that an unknown one resembles."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = getattr(parsed, "flags", ())
            near = nearest_name(rest[0].split("=")[0], flags)
            self.error(f"unknown argument {rest[0]!r}.{near}{getattr(parsed, 'unknown_hint', '')}")
        return parsed


def add_request_flags(parser: Parser, *, without: Collection[str] = ()) -> None:
    """A flag for each setting of ImageRequest, of the same name with dashes."""
    for field in ImageRequest.option_fields():
        if field.name not in without:
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                type=field.metadata["type"],
                default=field.default,
                metavar={int: "N", float: "X", str: "TEXT"}[field.metadata["type"]],
                help=field.metadata["help"].replace("%", "%%"),
            )


def add_model_flag(parser: Parser) -> None:
    """--model."""
    parser.add_argument(
        "--model", metavar="FOLDER", help="checkpoint of a known image family (the demo model if absent)"
    )


def add_pixel_device_flag(parser: Parser) -> None:
    """--pixel-device."""
    parser.add_argument(
        "--pixel-device",
        metavar="NAME",
        help="where pixels are computed: auto, cpu, cuda, cuda:1, ... (auto: vLLM's GPU if it has room, else the CPU)",
    )


def add_engine_flags(parser: Parser) -> None:
    """The flags that are about the run and not about a picture."""
    add_model_flag(parser)
    add_pixel_device_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, and nothing else")
    parser.add_argument("-v", "--verbose", action="store_true", help="show vLLM's own log, and tracebacks of errors")


def request_from(args: argparse.Namespace, prompt: str, **settings: Any) -> ImageRequest:
    """An ImageRequest from the parsed flags; `settings` go before them. Raises ConfigError."""
    given = {field.name: getattr(args, field.name) for field in ImageRequest.option_fields() if field.name in args}
    return ImageRequest(prompt, **{**given, **settings})


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts given as arguments, then those of a file (- is standard input), one a line; blank lines are skipped.

    Raises ConfigError if there are none or the file cannot be read.
    """
    if file is None:
        if not prompts:
            raise ConfigError("prompt", "give at least one prompt, or --prompts-file FILE (- is standard input).")
        return list(prompts)
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompts_file", f"cannot read prompts from {file!r}: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        name = "standard input" if file == "-" else repr(file)
        raise ConfigError("prompts_file", f"no prompts in {name}; write one a line.")
    return [*prompts, *lines]


def read_picture_file(file: str | None) -> bytes | None:
    """The contents of --init-image. Raises ConfigError if it cannot be read."""
    if file is None:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError("init_image", f"cannot read a picture from {file!r}: {error.strerror}") from error


def int_list(text: str) -> list[int]:
    """Whole numbers separated by commas, for argparse."""
    return _list_of(int, "whole numbers", text)


def float_list(text: str) -> list[float]:
    """Numbers separated by commas, for argparse."""
    return _list_of(float, "numbers", text)


def _list_of(kind: Callable[[str], Any], name: str, text: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {name} separated by commas; got {text!r}") from None
