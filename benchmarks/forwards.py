"""Forwards per picture by strategy, first guess, window, guidance and top-k, on the demo model or another checkpoint.

One engine; every cell of the table decodes the same prompts with the same seeds. A row is appended as soon as a cell
is measured, and a cell that the current commit has a row for is skipped, so that a run can be stopped and taken up.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sjd_vllm.config import ConfigError
from sjd_vllm.demo.captions import captions
from sjd_vllm.images.bench import mean_and_error, percentiles
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import Parser, float_list, int_list
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, measured_cells, rounded

if TYPE_CHECKING:
    from sjd_vllm.images.pipeline import ImagePipeline

RESULTS = Path(__file__).parent / "results" / "forwards.csv"
KEY = (
    "commit",
    "model",
    "guidance_scale",
    "top_k",
    "num_prompts",
    "first_seed",
    "first_guess",
    "redraft",
    "window",
)


def main() -> None:
    """Measure every cell that has no row yet."""
    args = _parse_args()
    prepare_environment(is_quiet=True)
    from sjd_vllm.images.pipeline import ImagePipeline

    prompts = captions(args.prompts, args.seed)
    args.output.parent.mkdir(exist_ok=True)
    done = measured_cells(args.output, KEY)
    taken_on = provenance()
    with ImagePipeline(
        args.model, num_speculative_tokens=max(args.windows), max_batch_size=args.batch_size
    ) as pipeline:
        pipeline.start()
        defaults = pipeline.family.defaults
        for redraft, first_guess, guidance_scale, top_k, window in itertools.product(
            args.redrafts.split(","),
            args.first_guesses.split(","),
            args.guidance_scales or [defaults.guidance_scale],
            args.top_ks or [defaults.top_k],
            args.windows,
        ):
            cell = {
                **taken_on,
                "model": pipeline.model.name,
                "guidance_scale": guidance_scale,
                "top_k": top_k,
                "num_prompts": len(prompts),
                "first_seed": args.seed,
                "first_guess": first_guess,
                "redraft": redraft,
                "window": window,
            }
            if tuple(str(cell[name]) for name in KEY) not in done:
                figures = _measure(pipeline, prompts, cell)
                append_rows(args.output, [{**cell, **figures}])
                name = f"{redraft} {first_guess}, guidance {guidance_scale:g}, top-k {top_k}, window {window}"
                print(f"{name}: {figures['forwards_mean']:g} ± {figures['forwards_se']:g} forwards")


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", help="checkpoint (the demo model if absent)")
    parser.add_argument("--prompts", type=int, default=64, help="captions to decode (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the captions and the first picture (0)")
    parser.add_argument("--windows", type=int_list, default=[8, 16, 32, 64], help="comma-separated (8,16,32,64)")
    parser.add_argument("--redrafts", default="gumbel,coupled,resample,reuse", help="comma-separated strategies")
    parser.add_argument("--first-guesses", default="uniform", help="how new drafts are made, comma-separated (uniform)")
    parser.add_argument("--guidance-scales", type=float_list, help="comma-separated (the model's)")
    parser.add_argument("--top-ks", type=int_list, help="comma-separated, 0 is all (the model's)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures decoded at once (8)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    args: argparse.Namespace = parser.parse_args()
    return args


def _measure(pipeline: ImagePipeline, prompts: list[str], cell: dict[str, Any]) -> dict[str, float]:
    """Decode all prompts with a cell's settings; prompt i has seed first_seed + i in every cell."""
    with tqdm(desc=f"{cell['redraft']} {cell['window']}", unit="row", mininterval=2.0) as bar:

        def show(rows: int, total: int) -> None:
            bar.total = total
            bar.update(rows - bar.n)

        result = pipeline.generate(
            prompts,
            seed=[cell["first_seed"] + index for index in range(len(prompts))],
            num_speculative_tokens=cell["window"],
            redraft=cell["redraft"],
            first_guess=cell["first_guess"],
            guidance_scale=cell["guidance_scale"],
            top_k=cell["top_k"],
            progress=show,
        )
    forwards = [picture.num_steps for picture in result.pictures]
    mean, standard_error = mean_and_error(forwards)
    return {
        "num_tokens": len(result.pictures[0].token_ids),
        "forwards_mean": rounded(mean),
        "forwards_se": rounded(standard_error, 2),
        **{f"forwards_{name}": rounded(value) for name, value in percentiles(forwards).items()},
        "tokens_per_forward": rounded(result.num_tokens / result.num_steps),
    }


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"forwards.py: error: {error}")
