"""`sjd-vllm serve`: vLLM's own server with speculative Jacobi decoding and the images API switched on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points

from sjd_vllm.config import FIRST_GUESS_NAMES, MAX_WINDOW, REDRAFT_NAMES, SJDConfig, check_int
from sjd_vllm.images.api_limits import LIMITS_KEY, ServerLimits
from sjd_vllm.images.environment import prepare_server_environment
from sjd_vllm.images.flags import Parser, add_model_flag, add_pixel_device_flag

_PLUGIN = "sjd_vllm"
_ROUTES = "vllm.endpoint_plugins"
_DEFAULTS = SJDConfig()
_SHUTDOWN_SECONDS = 30  # that pictures in work get to be finished after SIGTERM


def add_flags(parser: Parser) -> None:
    """The flags of this command; everything behind `--` is vLLM's."""
    add_model_flag(parser)
    parser.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help=f"draft tokens in the window, 0 to {MAX_WINDOW} ({_DEFAULTS.num_speculative_tokens})",
    )
    parser.add_argument(
        "--redraft",
        metavar="NAME",
        help=f"how drafts are refreshed: {', '.join(REDRAFT_NAMES)} ({_DEFAULTS.redraft})",
    )
    parser.add_argument(
        "--first-guess",
        metavar="NAME",
        help=f"how new drafts are made: {', '.join(FIRST_GUESS_NAMES)} ({_DEFAULTS.first_guess})",
    )
    add_pixel_device_flag(parser)
    parser.add_argument("--max-batch-size", type=int, default=16, metavar="N", help="pictures decoded at once (16)")
    for field in dataclasses.fields(ServerLimits):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.metadata["type"],
            default=field.default,
            metavar="N",
            help=f"{field.metadata['help']} ({field.default:g})",
        )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (8000)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.add_argument("vllm_flags", nargs="*", metavar="-- VLLM_FLAGS", help="any flags of `vllm serve`")
    parser.set_defaults(unknown_hint=" Flags of `vllm serve` go behind -- at the end.")


@dataclass(frozen=True)
class ServerSettings:
    """What makes `vllm serve` an images server. Raises ConfigError for a bad value."""

    model: str | None = None  # a checkpoint's folder; None is the demo model
    num_speculative_tokens: int | None = None  # draft tokens in the window; None is the default of SJDConfig
    redraft: str | None = None
    first_guess: str | None = None
    pixel_device: str | None = None
    max_batch_size: int = 16  # pictures decoded at once
    limits: ServerLimits = dataclasses.field(default_factory=ServerLimits)

    def __post_init__(self) -> None:
        check_int("max_batch_size", self.max_batch_size, 1, 1024)

    def vllm_arguments(self) -> list[str]:
        """The model and the flags of `vllm serve`; puts what they need into the environment of this process.

        Raises ConfigError for an unknown model or a bad setting.
        """
        prepare_server_environment()
        from sjd_vllm.images.engine import engine_settings
        from sjd_vllm.images.pipeline import ImagePipeline
        from sjd_vllm.models.checkpoint_files import load_format

        # Checks the model and the settings; its engine is never started.
        pipeline = ImagePipeline(
            self.model,
            num_speculative_tokens=self.num_speculative_tokens,
            redraft=self.redraft,
            first_guess=self.first_guess,
            pixel_device=self.pixel_device,
            max_batch_size=self.max_batch_size,
        )
        settings = {
            **engine_settings(pipeline.family, pipeline.config, self.max_batch_size, pipeline.max_model_len),
            "additional_config": {LIMITS_KEY: dataclasses.asdict(self.limits)},
            "shutdown_timeout": _SHUTDOWN_SECONDS,
            "load_format": load_format(pipeline.model),
            **pipeline.family.engine_args,
            "served_model_name": "demo" if self.model is None else pipeline.model.resolve().name,
        }
        os.environ["VLLM_PLUGINS"] = ",".join(_allowed_plugins())
        return [str(pipeline.model), *vllm_flags(settings)]


def _allowed_plugins() -> list[str]:
    """Names of vLLM's plugins to load: ours too, whose routes vLLM adds only where it is named.

    Where the user named none, vLLM loads all others of each group but that of routes, which naming ours must not end.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None:
        allowed = [name for name in named.split(",") if name]
    else:
        groups = [group for group in entry_points().groups if group.startswith("vllm.") and group != _ROUTES]
        allowed = sorted({entry.name for group in groups for entry in entry_points(group=group)})
    return list(dict.fromkeys([*allowed, _PLUGIN]))


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """From the parsed flags. Raises ConfigError."""
    limits = ServerLimits(**{field.name: getattr(args, field.name) for field in dataclasses.fields(ServerLimits)})
    return ServerSettings(
        model=args.model,
        num_speculative_tokens=args.num_speculative_tokens,
        redraft=args.redraft,
        first_guess=args.first_guess,
        pixel_device=args.pixel_device,
        max_batch_size=args.max_batch_size,
        limits=limits,
    )


def run(args: argparse.Namespace) -> int:
    """Check the settings and become `vllm serve`."""
    settings = server_settings(args)
    check_int("port", args.port, 1, 65_535)
    address = vllm_flags({"host": args.host, "port": args.port})
    sys.argv = ["vllm", "serve", *settings.vllm_arguments(), *address, *args.vllm_flags]
    from vllm.entrypoints.cli.main import main

    main()
    return 0


def vllm_flags(settings: dict[str, object]) -> list[str]:
    """Fields of `vllm.EngineArgs` as flags of `vllm serve`."""
    flags: list[str] = []
    for name, value in settings.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            flags += [f"--{dashed}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
