"""`sjd-vllm bench`: plain vLLM and speculative Jacobi decoding side by side on this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from sjd_vllm.config import check_int
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import Parser, add_engine_flags, add_request_flags, int_list, request_from
from sjd_vllm.images.generate_command import start_engine
from sjd_vllm.images.streams import reserved_stdout

if TYPE_CHECKING:
    from sjd_vllm.images.bench import BenchReport
    from sjd_vllm.images.pipeline import ImagePipeline
    from sjd_vllm.images.request import ImageRequest


def add_flags(parser: Parser) -> None:
    """The flags of this command."""
    parser.add_argument("--prompts", type=int, default=16, metavar="N", help="captions of the demo model to use (16)")
    parser.add_argument(
        "--concurrency",
        type=int_list,
        default=[1],
        metavar="N,N,...",
        help="pictures in the engine at once; 1 is always measured too",
    )
    parser.add_argument("--output-row", metavar="FILE", help="append the figures to a CSV file")
    add_request_flags(parser, without=("n", "method", "negative_prompt"))
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, start one engine, measure, report."""
    check_int("prompts", args.prompts, 1, 10_000)
    for value in args.concurrency:
        check_int("concurrency", value, 1, 1024)
    concurrencies = sorted({1, *args.concurrency})
    first_seed = 0 if args.seed is None else args.seed
    request_from(args, "any")  # a bad setting is told before captions are made
    prepare_environment(is_quiet=not args.verbose)
    with reserved_stdout() as stdout:
        from sjd_vllm.demo.captions import captions
        from sjd_vllm.images.bench import run_bench
        from sjd_vllm.images.machine import provenance
        from sjd_vllm.images.pipeline import ImagePipeline
        from sjd_vllm.images.rows import append_rows, check_rows_file

        requests = [
            request_from(args, prompt, seed=first_seed + index)
            for index, prompt in enumerate(captions(args.prompts, first_seed))
        ]
        pipeline = ImagePipeline(
            args.model,
            num_speculative_tokens=args.num_speculative_tokens,
            redraft=args.redraft,
            first_guess=args.first_guess,
            pixel_device=args.pixel_device,
            max_batch_size=max(concurrencies),
        )
        settings = _settings(pipeline, requests)
        if args.output_row:
            check_rows_file(args.output_row, [*provenance(), *settings, *_MEASURED])
        with contextlib.closing(pipeline):
            start_engine(pipeline, is_quiet=not args.verbose)
            with _picture_bar() as on_turn:
                report = run_bench(pipeline, requests, concurrencies, on_turn)
        rows = [{**provenance(), **settings, **measurement.row()} for measurement in report.measurements]
        if args.output_row:
            append_rows(args.output_row, rows)
        if args.json:
            print(json.dumps(_as_json(report, settings)), file=stdout)
        else:
            _print_table(report, stdout)
    return 0


_MEASURED = (
    "method",
    "concurrency",
    "num_pictures",
    "forwards_mean",
    "forwards_se",
    "tokens_per_forward",
    "latency_p20",
    "latency_p50",
    "latency_p80",
    "pictures_per_minute",
)


def _settings(pipeline: ImagePipeline, requests: Sequence[ImageRequest]) -> dict[str, Any]:
    first = pipeline.plan(requests)[0]
    return {
        "model": pipeline.model.name,
        "num_speculative_tokens": pipeline.config.num_speculative_tokens,
        "redraft": pipeline.config.redraft,
        "first_guess": pipeline.config.first_guess,
        "guidance_scale": first.sjd.guidance_scale,
        "temperature": first.temperature,
        "top_k": first.top_k,
        "top_p": first.top_p,
        "num_tokens": first.num_tokens,
    }


@contextlib.contextmanager
def _picture_bar() -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm

    with tqdm(total=0, unit="picture", desc="measuring", file=sys.stderr) as bar:

        def update(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        yield update


def _as_json(report: BenchReport, settings: dict[str, Any]) -> dict[str, Any]:
    from sjd_vllm.images.machine import provenance

    return {
        **provenance(),
        **settings,
        "step_compression": report.step_compression(),
        "latency_ratio": report.latency_ratio(),
        "throughput_ratio": {str(key): value for key, value in report.throughput_ratio().items()},
        "measurements": [measurement.row() for measurement in report.measurements],
    }


def _print_table(report: BenchReport, stdout: TextIO) -> None:
    line = "{:>11}  {:<6} {:>16} {:>15} {:>24} {:>13}"
    heads = ("concurrency", "method", "forwards/picture", "tokens/forward", "seconds p20/p50/p80", "pictures/min")
    print(line.format(*heads), file=stdout)
    for measurement in report.measurements:
        row = measurement.row()
        latency = " / ".join(f"{row[f'latency_{name}']:.3g}" for name in ("p20", "p50", "p80"))
        print(
            line.format(
                row["concurrency"],
                "plain" if row["method"] == "none" else "SJD",
                f"{row['forwards_mean']:g} ± {row['forwards_se']:g}",
                f"{row['tokens_per_forward']:.2f}",
                latency,
                f"{row['pictures_per_minute']:.1f}",
            ),
            file=stdout,
        )
    print(f"a picture alone: SJD is {report.latency_ratio():.2f} times as fast as plain decoding", file=stdout)
    for concurrency, ratio in report.throughput_ratio().items():
        if concurrency > 1:
            print(f"{concurrency} pictures at once: SJD makes {ratio:.2f} times as many a minute", file=stdout)
