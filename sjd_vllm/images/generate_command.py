"""`sjd-vllm generate`: prompts to PNG files."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from sjd_vllm.config import check_int
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import (
    Parser,
    add_engine_flags,
    add_request_flags,
    read_picture_file,
    read_prompts,
    request_from,
)
from sjd_vllm.images.streams import hidden_output, reserved_stdout

if TYPE_CHECKING:
    from sjd_vllm.images.output import OutputPaths
    from sjd_vllm.images.picture import GenerationResult
    from sjd_vllm.images.pipeline import ImagePipeline, Progress


def add_flags(parser: Parser) -> None:
    """The flags of this command."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to paint")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; - is standard input")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help="a .png file (of several pictures: the contact sheet, with the pictures numbered beside it) or a folder",
    )
    add_request_flags(parser)
    parser.add_argument(
        "--init-image", metavar="FILE", help="a PNG, JPEG or WebP picture whose upper --keep-rows are kept"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures decoded at once (8)")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, start the engine, decode, write."""
    init_image = read_picture_file(args.init_image)
    requests = [
        request_from(args, prompt, init_image=init_image) for prompt in read_prompts(args.prompts, args.prompts_file)
    ]
    check_int("batch_size", args.batch_size, 1, 1024)
    prepare_environment(is_quiet=not args.verbose)
    with reserved_stdout() as stdout:
        from sjd_vllm.images.output import OutputPaths
        from sjd_vllm.images.pipeline import ImagePipeline

        pipeline = ImagePipeline(
            args.model,
            num_speculative_tokens=args.num_speculative_tokens,
            redraft=args.redraft,
            first_guess=args.first_guess,
            pixel_device=args.pixel_device,
            max_batch_size=min(args.batch_size, sum(request.n for request in requests)),
        )
        planned = pipeline.plan(requests)
        output = OutputPaths.plan(args.output, len(planned))
        with contextlib.closing(pipeline):
            start_engine(pipeline, is_quiet=not args.verbose)
            with row_bar() as progress:
                result = pipeline.decode(planned, progress=progress)
        settings = {
            "model": str(pipeline.model),
            "method": args.method,
            "num_speculative_tokens": 0 if args.method == "none" else pipeline.config.num_speculative_tokens,
            "redraft": pipeline.config.redraft,
            "first_guess": pipeline.config.first_guess,
        }
        output.save(result.pictures, **settings)
        if args.json:
            report = {**settings, **_as_json(pipeline, result, output)}
            print(json.dumps(report), file=stdout)
        else:
            _print_summary(result, output, stdout)
    return 0


def start_engine(pipeline: ImagePipeline, *, is_quiet: bool) -> None:
    """Start the pipeline's engine and say so."""
    print(f"starting vLLM with {pipeline.model} ...", file=sys.stderr)
    with hidden_output(is_quiet):
        pipeline.start()


@contextlib.contextmanager
def row_bar() -> Iterator[Progress]:
    """A progress bar over rows of image tokens on standard error; yields the callback for the pipeline."""
    from tqdm import tqdm

    # Into a file or a pipe a bar writes a new line each time, so seldom there.
    interval = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(total=0, unit="row", desc="decoding", file=sys.stderr, mininterval=interval) as bar:

        def update(finished_rows: int, num_rows: int) -> None:
            bar.total = num_rows
            bar.update(finished_rows - bar.n)

        yield update


def _as_json(pipeline: ImagePipeline, result: GenerationResult, output: OutputPaths) -> dict[str, Any]:
    return {
        "seconds": result.seconds,
        "contact_sheet": str(output.sheet) if output.sheet else None,
        "pictures": [
            {
                **picture.settings(),
                **picture.counts(),
                "path": str(path),
                "token_ids": picture.token_ids,
                "legal_token_ranges": pipeline.family.grammar(picture.request.size).legal_token_ranges(),
            }
            for picture, path in zip(result.pictures, output.pictures, strict=True)
        ],
    }


def _print_summary(result: GenerationResult, output: OutputPaths, stdout: TextIO) -> None:
    for picture, path in zip(result.pictures, output.pictures, strict=True):
        print(
            f"{path}  {picture.request.prompt!r}  seed {picture.request.seed}: "
            f"{picture.request.num_new_tokens} tokens "
            f"in {picture.num_steps} forwards, {picture.seconds:.2f} s",
            file=stdout,
        )
    if output.sheet:
        print(f"{output.sheet}  contact sheet", file=stdout)
    per_picture = result.num_steps / len(result.pictures)
    print(
        f"{per_picture:.1f} forwards a picture; plain decoding takes {result.num_tokens / len(result.pictures):.1f}, "
        f"one a token: {result.num_tokens / result.num_steps:.2f} times as many",
        file=stdout,
    )
