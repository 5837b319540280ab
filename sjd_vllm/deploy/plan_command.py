"""`sjd-vllm plan`: the capacity model filled with a user's own figures."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from sjd_vllm.config import ConfigError, check_int
from sjd_vllm.images.flags import Parser, add_model_flag

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# name, default, help; all are numbers above 0
_FLAGS: tuple[tuple[str, float | None, str], ...] = (
    ("rate", 1.0, "pictures a second that are asked for"),
    ("gpu-memory", 80.0, "GB of a GPU"),
    ("memory-share", 0.85, "of it for weights, keys and values; the rest is activations and vLLM's own"),
    ("bandwidth", 3000.0, "GB a second that a GPU reads from its memory"),
    ("tflops", 300.0, "that its kernels reach in this model"),
    ("overhead-ms", 3.0, "milliseconds a step that are neither reading nor arithmetic"),
    ("bytes-per-number", 2.0, "of weights, keys and values"),
    (
        "step-ms",
        None,
        "measured: milliseconds a step however small; with the next two in place of the figures above",
    ),
    ("row-us", None, "measured: microseconds more for each sequence in the step"),
    ("token-us", None, "measured: microseconds more for each token in the step"),
    ("gain", None, "tokens that a very long window adds to each forward; measured on the demo model: 5.2"),
    ("utilization", 0.7, "of an engine's rate that is planned with, as requests do not come evenly"),
)
_ROOM = 64  # prompt tokens


def add_flags(parser: Parser) -> None:
    """The flags of this command."""
    add_model_flag(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs there are (1)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of each engine (1)")
    parser.add_argument("--no-guidance", action="store_true", help="plan without classifier-free guidance")
    for name, default, text in _FLAGS:
        shown = "" if default is None else f" ({default:g})"
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=text + shown)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    _check(args)
    from sjd_vllm.deploy.plan import smallest_batch_for

    model = _model(args)
    weights = model.shape.num_parameters * args.bytes_per_number / args.tensor_parallel_size
    free = args.tensor_parallel_size * (args.gpu_memory * 1e9 * args.memory_share - weights)
    largest = model.largest_batch(free)
    if largest < 1:
        raise ConfigError(
            "gpu_memory",
            f"one picture does not fit: weights take {weights / 1e9:.1f} GB of each GPU's "
            f"{args.gpu_memory * args.memory_share:.1f}; take more GPUs a replica (--tensor-parallel-size).",
        )
    replicas = args.gpus // args.tensor_parallel_size
    needed = args.rate / args.utilization / replicas
    chosen = smallest_batch_for(model, needed, min(largest, _BATCHES[-1]))
    table = [_row(model.best(batch), replicas, args.tensor_parallel_size) for batch in _BATCHES if batch <= largest]
    plan: dict[str, Any] = {
        "picture_tokens": model.shape.picture_tokens,
        "parameters": model.shape.num_parameters,
        "weights_gb_per_gpu": weights / 1e9,
        "kv_mb_per_picture": model.kv_bytes_per_picture / 1e6,
        "largest_batch": largest,
        "replicas": replicas,
        "rate_asked": args.rate,
        "chosen": chosen and _row(chosen, replicas, args.tensor_parallel_size),
        "replicas_needed": replicas if chosen else math.ceil(args.rate / args.utilization / _highest(table)),
        "by_batch": table,
    }
    print(json.dumps(plan, indent=2) if args.json else _text(plan, args))
    return 0


def _model(args: argparse.Namespace) -> Any:
    from sjd_vllm.deploy.plan import DEMO_GAIN, CapacityModel, ModelShape, StepCost
    from sjd_vllm.deploy.settings import DeploySettings

    shape = ModelShape.read(DeploySettings(model=args.model).checkpoint())
    if args.step_ms is not None:
        cost = StepCost(args.step_ms / 1e3, args.row_us / 1e6, args.token_us / 1e6)
    else:
        cost = StepCost.of_hardware(
            shape,
            bandwidth=args.bandwidth * 1e9,
            flops=args.tflops * 1e12,
            overhead=args.overhead_ms / 1e3,
            bytes_per_number=args.bytes_per_number,
            num_gpus=args.tensor_parallel_size,
        )
    return CapacityModel(
        shape,
        cost,
        gain=DEMO_GAIN if args.gain is None else args.gain,
        is_guided=not args.no_guidance,
        prompt_tokens=_ROOM,
        bytes_per_number=args.bytes_per_number,
    )


def _check(args: argparse.Namespace) -> None:
    check_int("tensor_parallel_size", args.tensor_parallel_size, 1, 1024)
    check_int("gpus", args.gpus, args.tensor_parallel_size, 1_000_000)
    for name, _, _ in _FLAGS:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(name, f"--{name} must be a number above 0; got {value!r}.")
    for name in ("memory_share", "utilization"):
        if getattr(args, name) > 1:
            raise ConfigError(name, f"--{name.replace('_', '-')} must be at most 1; got {getattr(args, name)!r}.")
    measured = [getattr(args, name) for name in ("step_ms", "row_us", "token_us")]
    if None in measured and measured != [None] * 3:
        raise ConfigError("step_ms", "--step-ms, --row-us and --token-us go together; give all three.")
    if args.model is not None and not (Path(args.model) / "config.json").is_file():
        raise ConfigError("model", f"model must be the folder of a checkpoint; got {args.model!r}.")


def _row(capacity: Any, replicas: int, gpus: int) -> dict[str, float]:
    return {
        "batch": capacity.batch,
        "window": capacity.window,
        "forwards": capacity.forwards,
        "step_ms": capacity.step_seconds * 1e3,
        "latency_seconds": capacity.latency,
        "rate_per_gpu": capacity.rate / gpus,
        "rate": capacity.rate * replicas,
        "kv_gb": capacity.kv_bytes / 1e9,
    }


def _highest(table: list[dict[str, float]]) -> float:
    """Pictures a second of the best single engine in a table."""
    return max(row["batch"] / row["latency_seconds"] for row in table)


def _text(plan: dict[str, Any], args: argparse.Namespace) -> str:
    replicas, chosen = plan["replicas"], plan["chosen"]
    lines = [
        f"A picture: {plan['picture_tokens']} tokens, {plan['kv_mb_per_picture']:.1f} MB of keys and values. "
        f"Weights: {plan['weights_gb_per_gpu']:.2f} GB a GPU. "
        f"At most {plan['largest_batch']} pictures at once a replica.",
        "",
        "pictures at once  window  forwards  step ms  latency s  pictures/s a GPU  all replicas  KV GB",
    ]
    for row in plan["by_batch"]:
        lines.append(
            f"{row['batch']:>16}  {row['window']:>6}  {row['forwards']:>8.1f}  {row['step_ms']:>7.2f}  "
            f"{row['latency_seconds']:>9.2f}  {row['rate_per_gpu']:>16.2f}  {row['rate']:>12.2f}  {row['kv_gb']:>5.2f}"
        )
    asked = f"{args.rate:g} pictures a second at {args.utilization:.0%} of capacity"
    if chosen is None:
        lines += ["", f"{replicas} replica(s) are too few for {asked}: take {plan['replicas_needed']}."]
    else:
        lines += [
            "",
            f"For {asked}: {replicas} replica(s) with {chosen['batch']} picture(s) at once each, "
            f"{chosen['latency_seconds']:.2f} s a picture (--max-batch-size {chosen['batch']}).",
        ]
    return "\n".join(lines)
