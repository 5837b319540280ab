"""The command `sjd-vllm`.

Exit codes: 0 done; 1 something failed while running; 2 bad input, told in one line; 130 interrupted.
Nothing heavy is imported until the arguments have been checked. This module stands above all folders: it knows every
command, and nothing imports it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sjd_vllm import __version__
from sjd_vllm.config import ConfigError, check_int
from sjd_vllm.deploy import plan_command, serve_command
from sjd_vllm.evaluation import eval_command, report_command
from sjd_vllm.images import bench_command, check_command, generate_command
from sjd_vllm.images.flags import Parser

_HELP = "sjd-vllm --help says more."


@dataclass(frozen=True)
class Command:
    """One word behind `sjd-vllm`: what adds its flags to a parser, and what runs it and returns the exit code."""

    name: str
    summary: str
    add_flags: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    verbose = False
    try:
        args = _parser().parse_args(argv)
        verbose = getattr(args, "verbose", False)
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except ConfigError as error:
        return _fail(2, error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); keep Python from complaining when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if verbose:
            raise
        return _fail(1, f"{type(error).__name__}: {error} (--verbose shows where)")


def _fail(code: int, message: object) -> int:
    print("sjd-vllm: error:", " ".join(str(message).split()), file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="sjd-vllm",
        description="Pictures from text by speculative Jacobi decoding on vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"sjd-vllm {__version__}")
    parser.set_defaults(run=_no_command)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for command in _COMMANDS:
        _add(commands, command)
    return parser


def _add(commands: argparse._SubParsersAction[Parser], command: Command) -> None:
    summary = command.summary
    parser = commands.add_parser(command.name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.add_flags(parser)
    parser.set_defaults(run=command.run, flags=tuple(parser._option_string_actions))


def _no_command(args: argparse.Namespace) -> int:
    *names, last = (command.name for command in _COMMANDS)
    raise ConfigError("command", f"say what to do: {', '.join(names)} or {last}. {_HELP}")


def _demo_path(args: argparse.Namespace) -> int:
    from sjd_vllm.demo import checkpoint_path

    print(checkpoint_path())
    return 0


def _demo_prompts_flags(parser: Parser) -> None:
    parser.add_argument("count", type=int, metavar="N", help="how many captions, 1 to 1000000")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (0)")


def _demo_prompts(args: argparse.Namespace) -> int:
    check_int("N", args.count, 1, 1_000_000)
    check_int("seed", args.seed, 0, 2**63 - 1)
    from sjd_vllm.demo.captions import captions

    print("\n".join(captions(args.count, args.seed)))
    return 0


_COMMANDS = (
    Command("generate", "pictures from prompts", generate_command.add_flags, generate_command.run),
    Command("bench", "plain vLLM and SJD side by side on this machine", bench_command.add_flags, bench_command.run),
    Command(
        "serve",
        "vLLM's own server with SJD and the images API; with --ray-replicas, several of them on a Ray cluster",
        serve_command.add_flags,
        serve_command.run,
    ),
    Command("check", "what a checkpoint is, and what is wrong with it", check_command.add_flags, check_command.run),
    Command("eval", "all methods on a suite of prompts, and tests of them", eval_command.add_flags, eval_command.run),
    Command("report", "a page about runs of eval", report_command.add_flags, report_command.run),
    Command(
        "plan",
        "pictures a second and memory that GPUs can be expected to give",
        plan_command.add_flags,
        plan_command.run,
    ),
    Command("demo-path", "print where the demo checkpoint lies", lambda _: None, _demo_path),
    Command("demo-prompts", "print captions that the demo model understands", _demo_prompts_flags, _demo_prompts),
)

if __name__ == "__main__":
    sys.exit(main())
