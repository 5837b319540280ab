"""`sjd-vllm eval`: every method on a suite's prompts, and what can be said about the pictures."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sjd_vllm.config import GUMBEL, ConfigError, SJDConfig, check_choice, check_int, check_window
from sjd_vllm.evaluation.methods import BIASED, Method, parse_methods
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import Parser, add_engine_flags, add_request_flags, int_list, request_from
from sjd_vllm.images.streams import hidden_output, reserved_stdout

if TYPE_CHECKING:
    from sjd_vllm.evaluation.run_folder import RunFolder
    from sjd_vllm.images.pipeline import ImagePipeline
    from sjd_vllm.images.request import PictureRequest

_METHODS = "none,resample,coupled,gumbel,reuse"
_NO_FLAGS = ("n", "seed", "method", "redraft", "num_speculative_tokens", "init_image", "keep_rows")
_SCORES = ("clip", "fid")


def add_flags(parser: Parser) -> None:
    """The flags of this command."""
    parser.add_argument(
        "--suite",
        nargs="+",
        default=["demo"],
        metavar=("NAME", "FILE"),
        help="demo, or geneval, t2i-compbench, coco, parti, prompts with the file that its authors publish",
    )
    parser.add_argument(
        "--methods",
        default=_METHODS,
        metavar="NAME,...",
        help=f"none and redrafts, NAME@WINDOW for a window of its own ({_METHODS})",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="of the run; an old one is gone on with"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="so many prompts, spread over the suite (all; demo: 64)")
    parser.add_argument("--n", type=int, metavar="N", help="pictures of each prompt (what the suite's authors score)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first picture, the others count on (0)"
    )
    parser.add_argument(
        "--num-speculative-tokens",
        type=int,
        default=SJDConfig().num_speculative_tokens,
        metavar="N",
        help=f"draft tokens in the window ({SJDConfig().num_speculative_tokens})",
    )
    parser.add_argument("--windows", type=int_list, metavar="N,N,...", help="every method at each of these windows")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="pictures at once (1: the seconds of a picture alone)"
    )
    parser.add_argument("--reuse-threshold", type=float, metavar="X", help="of reuse and reuse_biased (0.8)")
    parser.add_argument(
        "--lossless",
        action="store_true",
        help=f"test every token against the model's distribution; adds {BIASED}, the control that must fail",
    )
    parser.add_argument("--score", default="", metavar="NAME,...", help="clip and fid; they need packages and weights")
    parser.add_argument("--clip-model", metavar="FOLDER", help="CLIP checkpoint of the score clip")
    parser.add_argument("--fid-reference", metavar="FOLDER", help="real pictures of the score fid")
    parser.add_argument("--engine-args", default="{}", metavar="JSON", help="more fields of vLLM's EngineArgs")
    add_request_flags(parser, without=_NO_FLAGS)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, then go on wherever the run stands."""
    methods = _methods(args)
    check_int("batch_size", args.batch_size, 1, 1024)
    for name in ("limit", "n"):
        if getattr(args, name) is not None:
            check_int(name, getattr(args, name), 1, 1_000_000)
    check_int("seed", args.seed, 0, 2**62)
    check_window("num_speculative_tokens", args.num_speculative_tokens)
    scores = [name for name in args.score.split(",") if name]
    for name in scores:
        check_choice("score", name, _SCORES)
    request_from(args, "any", n=1)  # a bad setting is told before anything heavy is imported
    engine_args = _engine_args(args.engine_args)
    prepare_environment(is_quiet=not args.verbose)
    with reserved_stdout() as stdout:
        from sjd_vllm.evaluation.scores import check_scores
        from sjd_vllm.evaluation.suites import read_suite

        check_scores(scores, args.clip_model, args.fid_reference)
        suite = read_suite(args.suite[0], args.suite[1:], limit=args.limit, seed=args.seed)
        pipeline = _pipeline(args, methods, engine_args)
        folder, planned = _open(args, methods, suite, pipeline, engine_args)
        with contextlib.closing(pipeline):
            _make(folder, pipeline, planned, args)
        if args.lossless:
            _test_losslessness(folder, pipeline, planned, engine_args, is_quiet=not args.verbose)
        results = _evaluate(folder, pipeline, scores, args)
        if args.json:
            print(json.dumps(results), file=stdout)
        else:
            _print_results(folder, results, stdout)
    return 0


def _methods(args: argparse.Namespace) -> list[Method]:
    methods = parse_methods(args.methods, args.num_speculative_tokens, args.windows or ())
    if args.lossless and not any(method.name == BIASED for method in methods):
        methods += parse_methods(BIASED, args.num_speculative_tokens)
    return methods


def _engine_args(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError("engine_args", f"engine_args must be a JSON object; {error}.") from error
    if not isinstance(given, dict):
        raise ConfigError("engine_args", f"engine_args must be a JSON object; got {text!r}.")
    return given


def _pipeline(args: argparse.Namespace, methods: Sequence[Method], engine_args: dict[str, Any]) -> ImagePipeline:
    from sjd_vllm.images.pipeline import ImagePipeline

    return ImagePipeline(
        args.model,
        num_speculative_tokens=max(method.window for method in methods),
        redraft=GUMBEL,
        reuse_threshold=args.reuse_threshold,
        pixel_device=args.pixel_device,
        max_batch_size=args.batch_size,
        **engine_args,
    )


def _open(
    args: argparse.Namespace,
    methods: Sequence[Method],
    suite: Any,
    pipeline: ImagePipeline,
    engine_args: dict[str, Any],
) -> tuple[RunFolder, dict[str, list[tuple[int, int, PictureRequest]]]]:
    """The run's folder, and every picture in it that there will be."""
    from sjd_vllm.evaluation.run_folder import RunFolder
    from sjd_vllm.evaluation.sampling import planned_pictures
    from sjd_vllm.images.machine import provenance

    request_settings = {
        name: getattr(args, name)
        for name in ("guidance_scale", "negative_prompt", "size", "temperature", "top_k", "top_p", "first_guess")
    }
    settings = {
        "model": str(pipeline.model),
        "family": pipeline.family.name,
        "suite": suite.name,
        "methods": [asdict(method) for method in methods],
        "prompts": [asdict(prompt) for prompt in suite.prompts],
        "images_per_prompt": args.n or suite.images_per_prompt,
        "first_seed": args.seed,
        "batch_size": args.batch_size,
        "reuse_threshold": pipeline.config.reuse_threshold,
        "engine_args": engine_args,
        **request_settings,
    }
    planned = planned_pictures(RunFolder(Path(args.output), settings), pipeline, request_settings)
    first = planned[methods[0].label][0][2]
    settings |= {
        "size": str(first.size),
        "guidance_scale": first.sjd.guidance_scale,
        "temperature": first.temperature,
        "top_k": first.top_k,
        "top_p": first.top_p,
        "provenance": provenance(),
    }
    return RunFolder.create(args.output, settings), planned


def _make(folder: RunFolder, pipeline: ImagePipeline, planned: Any, args: argparse.Namespace) -> None:
    from sjd_vllm.evaluation.sampling import make_pictures
    from sjd_vllm.images.generate_command import start_engine

    if len(folder.records()) < sum(map(len, planned.values())):
        start_engine(pipeline, is_quiet=not args.verbose)
        with _bar("pictures", "picture") as on_pictures:
            make_pictures(folder, pipeline, planned, batch_size=args.batch_size, on_pictures=on_pictures)


def _test_losslessness(
    folder: RunFolder, pipeline: ImagePipeline, planned: Any, engine_args: dict[str, Any], *, is_quiet: bool
) -> None:
    from sjd_vllm.evaluation.lossless import score_pictures
    from sjd_vllm.evaluation.reference import Reference

    def reference() -> Reference:
        print("starting vLLM without SJD, for the model's own distributions ...", file=sys.stderr)
        with hidden_output(is_quiet):
            return Reference(pipeline.family, pipeline.max_model_len, engine_args)

    with _bar("distributions", "picture") as on_pictures:
        score_pictures(folder, reference, planned, on_pictures)


def _evaluate(
    folder: RunFolder, pipeline: ImagePipeline, scores: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    from sjd_vllm.evaluation.accuracy import accuracy_results
    from sjd_vllm.evaluation.layouts import write_layouts
    from sjd_vllm.evaluation.lossless import lossless_results
    from sjd_vllm.evaluation.scores import score_results
    from sjd_vllm.evaluation.speed import speed_results
    from sjd_vllm.evaluation.two_sample import two_sample_results

    write_layouts(folder)
    has_scorer = (pipeline.model / "scorer").is_dir()
    return {
        "output": str(folder.path),
        "speed": speed_results(folder),
        "lossless": lossless_results(folder),
        "two_sample": two_sample_results(folder, pipeline.family),
        "accuracy": accuracy_results(folder, pipeline.model) if has_scorer else {},
        "scores": score_results(
            folder,
            scores,
            clip_model=args.clip_model,
            fid_reference=None if args.fid_reference is None else Path(args.fid_reference),
        ),
    }


@contextlib.contextmanager
def _bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with an estimate of the time left, which counts what this start has done."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10.0
    bar: tqdm[Any] | None = None

    def update(num_done: int, num_all: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=num_all, initial=num_done, unit=unit, desc=what, file=sys.stderr, mininterval=interval)
        bar.update(num_done - bar.n)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


def _print_results(folder: RunFolder, results: dict[str, Any], stdout: TextIO) -> None:
    from sjd_vllm.evaluation.layouts import scorer_commands
    from sjd_vllm.evaluation.lossless import verdict
    from sjd_vllm.evaluation.scores import NEEDS

    line = "{:<16} {:>18} {:>9} {:>12} {:>9}  {}"
    print(line.format("method", "forwards", "fewer", "seconds p50", "faster", "losslessness"), file=stdout)
    for label, row in results["speed"].items():
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        identical = results["lossless"]["methods"][label]["identical"]
        same = (
            f"; {identical['pictures']} of {identical['of']} pictures are plain decoding's" if identical["of"] else ""
        )
        is_fixed = row["name"] == GUMBEL
        print(
            line.format(
                label,
                f"{row['forwards_mean']:.1f} ± {row['forwards_se']:.1f}",
                f"{row['compression']:.2f}x",
                f"{row['seconds_p50']:.2f}",
                speedup,
                verdict(results["lossless"], label) + (same if is_fixed else ""),
            ),
            file=stdout,
        )
    for label, values in results["scores"].items():
        if values:
            print(f"{label}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()), file=stdout)
    suite = folder.settings["suite"]
    if suite in NEEDS:
        print(f"To score, with {NEEDS[suite]}:", file=stdout)
        for command in scorer_commands(folder):
            print(f"  {command}", file=stdout)
    print(
        f"Pictures, tokens and results are in {folder.path}; `sjd-vllm report {folder.path}` draws them.", file=stdout
    )
