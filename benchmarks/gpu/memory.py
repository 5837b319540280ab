"""Memory by pictures at once on the 7B shape, both guidance halves: what the engine holds, against what is foretold.

Pictures are given with their prompts but for the last row, so that each soon holds all of its keys and values; the most
KV blocks that are in use at once are counted. `sjd-vllm check` and `sjd-vllm plan` foretell the same from the
checkpoint's config. What fits is vLLM's own figure: the blocks that it made room for.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.gpu.common import Run, parser, runner_name, runner_of
from benchmarks.gpu.steps import partly_given
from sjd_vllm.config import ConfigError, SJDConfig, check_int
from sjd_vllm.deploy.plan import CapacityModel, ModelShape, StepCost
from sjd_vllm.images.check_command import checkpoint_report
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.flags import int_list
from sjd_vllm.images.rows import rounded

COUNTS = [1, 4, 16, 64]
_ROWS_LEFT = 1
_GB = 1e9


def main() -> None:
    """One engine; a row a number of pictures."""
    made = parser(__doc__)
    made.add_argument("--pictures", type=int_list, default=COUNTS, help="at once (1,4,16,64)")
    args = made.parse_args()
    for count in args.pictures:
        check_int("pictures", count, 1, 1024)
    run = Run.from_flags(args)
    rows = run.rows("memory", "shape", "pictures")
    counts = [count for count in args.pictures if not rows.has(shape=run.shape.name, pictures=count)]
    if not counts:
        return
    prepare_environment(is_quiet=True)
    from sjd_vllm.images.pipeline import ImagePipeline

    window = SJDConfig().num_speculative_tokens
    with ImagePipeline(
        num_speculative_tokens=window, max_batch_size=max(args.pictures), **run.engine_args()
    ) as pipeline:
        pipeline.start()
        llm = pipeline._engine._llm  # type: ignore[union-attr]
        for count in counts:
            cell = {"shape": run.shape.name, "pictures": count}
            rows.append({**cell, "window": window, "model_runner": runner_name(llm), **measure(pipeline, count)})


def measure(pipeline: Any, count: int) -> dict[str, object]:
    """Decode so many pictures at once, and look at the engine after every step."""
    engine = pipeline._engine
    core = engine._llm.engine_core.engine_core
    grammar = pipeline.family.grammar(pipeline.family.sizes[0])
    pictures = partly_given(pipeline, count, None, grammar.grid[0] - _ROWS_LEFT)
    left = {engine._submit(picture) for picture in pictures}
    highest, most_running = 0.0, 0
    while left:
        left -= {output.request_id for output in engine._llm.step() if output.finished}
        highest = max(highest, core.scheduler.kv_cache_manager.usage)
        most_running = max(most_running, len(core.scheduler.running))
    capacity = kv_bytes(engine._llm)
    used = highest * capacity
    used_each = 2 * used / most_running
    foretold = _foretold(pipeline, count)
    cuda = torch.cuda.is_available()
    return {
        "sequences_at_once": most_running,
        "kv_used_gb": rounded(used / _GB),
        "kv_check_gb": rounded(foretold["check"] / _GB),
        "kv_plan_gb": rounded(foretold["plan"] / _GB),
        "used_over_check": rounded(count * used_each / foretold["check"]),
        "used_over_plan": rounded(count * used_each / foretold["plan"]),
        "kv_room_gb": rounded(capacity / _GB),
        "pictures_that_fit": int(capacity / used_each),
        "pictures_that_fit_by_plan": foretold["fit"](capacity),
        "weights_gb": rounded(_weight_bytes(engine._llm) / _GB),
        "weights_plan_gb": rounded(foretold["weights"] / _GB),
        "device_reserved_gb": rounded(torch.cuda.memory_reserved() / _GB) if cuda else "",
        "device_total_gb": rounded(torch.cuda.get_device_properties(0).total_memory / _GB) if cuda else "",
    }


def kv_bytes(llm: Any) -> int:
    """Of all KV blocks that the engine can use; one more is vLLM's own."""
    config = llm.engine_core.engine_core.scheduler.kv_cache_config
    block = sum(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in config.kv_cache_groups)
    return int(block * (config.num_blocks - 1))


def _weight_bytes(llm: Any) -> int:
    return sum(parameter.nbytes for parameter in runner_of(llm).get_model().parameters())


def _foretold(pipeline: Any, count: int) -> dict[str, Any]:
    """Bytes of the keys and values of so many pictures and of the decoder's weights; and what fits into so many."""
    dtype = pipeline._engine._llm.vllm_config.model_config.dtype
    report = checkpoint_report(pipeline.family)
    # check speaks of bfloat16, two bytes a number
    check = count * report["sizes"][0]["guided_kv_bytes"] * dtype.itemsize // 2
    model = CapacityModel(ModelShape.read(pipeline.model), StepCost(0, 0, 0), bytes_per_number=dtype.itemsize)
    return {
        "check": check,
        "plan": count * model.kv_bytes_per_picture,
        "fit": model.largest_batch,
        "weights": model.shape.num_parameters * dtype.itemsize,
    }


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"memory.py: error: {error}")
