"""The whole command `sjd-vllm`: that of one machine, with clusters in `serve`, and `plan`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sjd_vllm.deploy import plan_command, serve_command
from sjd_vllm.images.cli import COMMANDS, Command
from sjd_vllm.images.cli import main as run_command

_ADDED = (
    Command(
        "serve",
        "vLLM's own server with SJD and the images API; with --ray-replicas, several of them on a Ray cluster",
        serve_command.add_flags,
        serve_command.run,
    ),
    Command(
        "plan",
        "pictures a second and memory that GPUs can be expected to give",
        plan_command.add_flags,
        plan_command.run,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    names = {command.name for command in _ADDED}
    first = [command for command in COMMANDS if command.name not in names]
    return run_command(argv, [*first, *_ADDED])


if __name__ == "__main__":
    sys.exit(main())
