"""`sjd-vllm check`: what a checkpoint is, what it takes, and what is wrong with it; no weights are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sjd_vllm.config import ConfigError, SJDConfig
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import Parser

if TYPE_CHECKING:
    from sjd_vllm.models.family import ImageFamily

_BYTES_PER_NUMBER = 2  # of keys and values, in bfloat16
_MIB = 1 << 20


def add_flags(parser: Parser) -> None:
    """The flags of this command."""
    parser.add_argument("model", metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if the checkpoint can be served, 1 if something is wrong with it."""
    prepare_environment(is_quiet=True)
    from sjd_vllm.models.registry import families, load_family
    from sjd_vllm.runner_choice import runner_name

    path = Path(args.model).expanduser()
    if not path.is_dir():
        raise ConfigError("model", f"{args.model!r} is not a folder.")
    try:
        family = load_family(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError("model", f"the checkpoint in {path} cannot be read: {error}") from error
    if family is None:
        raise ConfigError(
            "model", f"the checkpoint in {path} is of no image family that is known: {', '.join(families())}."
        )
    report = {**checkpoint_report(family), "model_runner": runner_name(SJDConfig())}
    if args.json:
        print(json.dumps(report))
    else:
        print(_as_text(report))
    return 1 if report["problems"] else 0


def checkpoint_report(family: ImageFamily) -> dict[str, Any]:
    """What `check` says, as plain JSON types; memory in bytes."""
    shape = family.shape
    try:
        problems = family.problems()
    except (ValueError, OSError) as error:
        problems = [str(error)]
    kv_bytes = shape.kv_bytes_per_token(_BYTES_PER_NUMBER)
    sizes = []
    for size in family.sizes:
        num_tokens = family.grammar(size).num_tokens
        # The prompts are short beside the picture; both halves keep the picture's tokens.
        sizes.append({"size": str(size), "num_tokens": num_tokens, "guided_kv_bytes": 2 * num_tokens * kv_bytes})
    return {
        "model": str(family.path),
        "family": family.name,
        "sizes": sizes,
        "max_positions": shape.max_positions,
        "vocab_size": shape.vocab_size,
        "num_layers": shape.num_layers,
        "weight_bytes": sum(file.stat().st_size for file in family.weight_files()),
        "defaults": {
            "guidance_scale": family.defaults.guidance_scale,
            "temperature": family.defaults.temperature,
            "top_k": family.defaults.top_k,
            "top_p": family.defaults.top_p,
        },
        "can_start_from_a_picture": family.can_encode,
        "window": SJDConfig().num_speculative_tokens,
        "problems": problems,
    }


def _as_text(report: dict[str, Any]) -> str:
    defaults = report["defaults"]
    largest = max(report["sizes"], key=lambda size: size["num_tokens"])
    shown = report["sizes"][:8]
    more = len(report["sizes"]) - len(shown)
    lines = [
        f"family    {report['family']}, {report['num_layers']} layers, {report['vocab_size']} ids, "
        f"{report['max_positions']} positions",
        "sizes     "
        + ", ".join(f"{size['size']} ({size['num_tokens']} tokens)" for size in shown)
        + (f" and {more} more" if more else ""),
        f"defaults  guidance {defaults['guidance_scale']:g}, temperature {defaults['temperature']:g}, "
        f"top-k {defaults['top_k']}, top-p {defaults['top_p']:g}",
        f"memory    weights {_mib(report['weight_bytes'])} as stored; keys and values of one guided picture up to "
        f"{_mib(largest['guided_kv_bytes'])} in bfloat16",
        f"window    {report['window']} drafts, shortened by the engine where load makes them cost more than they gain",
        f"pictures  {'can' if report['can_start_from_a_picture'] else 'cannot'} start from a given one",
        f"runner    vLLM's model runner {report['model_runner']} on this machine",
        *(f"problem   {problem}" for problem in report["problems"]),
        f"{len(report['problems'])} to be mended" if report["problems"] else "ready to be served",
    ]
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"
