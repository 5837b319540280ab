"""`sjd-vllm serve`, with --ray-replicas as several engines on a Ray cluster."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from sjd_vllm.config import ConfigError, check_int
from sjd_vllm.images import serve_command
from sjd_vllm.images.flags import Parser


def add_flags(parser: Parser) -> None:
    """The flags of `sjd-vllm serve` on one machine, and those of a cluster."""
    serve_command.add_flags(parser)
    parser.add_argument("--ray-replicas", type=int, metavar="N", help="serve with so many engines on a Ray cluster")
    parser.add_argument("--ray-max-replicas", type=int, metavar="N", help="add engines under load, up to so many")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a running cluster (RAY_ADDRESS, or else a new one on this machine)"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, metavar="N", help="GPUs of each engine; with --ray-replicas"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    if args.ray_replicas is None:
        for name in ("ray_max_replicas", "ray_address", "tensor_parallel_size"):
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(name, f"{flag} goes with --ray-replicas; on one machine vLLM's flags go behind --.")
        return serve_command.run(args)
    settings = _settings(args)
    check_int("port", args.port, 1, 65_535)
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError("ray_replicas", "--ray-replicas needs Ray: pip install 'sjd-vllm[ray]'.") from error
    from sjd_vllm.deploy.ray_serve import APP_NAME, build

    ray.init(address=args.ray_address, log_to_driver=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ctrl-C and SIGTERM both drain and stop
    serve.start(http_options={"host": args.host, "port": args.port})
    try:
        serve.run(build(settings), name=APP_NAME, route_prefix="/", blocking=True)
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """`args` of the application; the flags have the names of its fields."""
    from sjd_vllm.deploy.settings import DeploySettings

    limits = serve_command.server_settings(args).limits
    given = {
        "model": args.model,
        "num_speculative_tokens": args.num_speculative_tokens,
        "redraft": args.redraft,
        "first_guess": args.first_guess,
        "pixel_device": args.pixel_device,
        "max_batch_size": args.max_batch_size,
        "max_pending_pictures": limits.max_pending_pictures,
        "request_timeout": limits.request_timeout,
        "client_timeout": limits.client_timeout,
        "replicas": args.ray_replicas,
        "max_replicas": args.ray_max_replicas,
        "tensor_parallel_size": args.tensor_parallel_size,
        "vllm_flags": tuple(args.vllm_flags),
    }
    return DeploySettings.from_mapping({name: value for name, value in given.items() if value is not None}).to_mapping()
