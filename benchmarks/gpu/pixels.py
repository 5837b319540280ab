"""xformers' memory-efficient attention against PyTorch's own in Chameleon's pixel decoder, alone and in all of it.

Attention has one head as wide as the map has channels, over all codes of a picture (`models/pixel_attention.py`).
Numbers are random; differences are against PyTorch's attention in float32. A combination that an implementation refuses
gets a row that says so. The servers decode pixels on the CPU today, wherever the engine is; this tells what a GPU would
give.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import Run, parser
from benchmarks.gpu.timing import times
from sjd_vllm.config import ConfigError
from sjd_vllm.images.flags import int_list
from sjd_vllm.images.rows import rounded
from sjd_vllm.models import pixel_attention as attention
from sjd_vllm.models.chameleon.vq import ChameleonVQ, VQShape, vq_shape

# Codes of a picture's side: 512, 768 and 1024 pixels.
SIDES, BATCHES = [32, 48, 64], [1, 8]
_REPEATS = 20


def main() -> None:
    """A row a part, side, batch, type and implementation."""
    made = parser(__doc__)
    made.add_argument("--sides", type=int_list, help="codes of a picture's side (32,48,64)")
    made.add_argument("--batches", type=int_list, default=BATCHES, help="pictures at once (1,8)")
    made.add_argument("--repeats", type=int, default=_REPEATS, help="times that each is measured (20)")
    args = made.parse_args()
    run = Run.from_flags(args)
    rows = run.rows("pixels", "shape", "part", "side", "batch", "dtype", "implementation")
    shape = decoder_shape(run)
    decoder = random_decoder(shape, run.device)
    channels = shape.base_channels * shape.channel_multiplier[-1]
    dtypes = [torch.bfloat16, torch.float16] if run.device.type == "cuda" else [torch.float32]
    names = ["torch", "xformers"] if run.device.type == "cuda" else ["torch"]
    sides = args.sides or ([run.shape.grid] if run.is_small else SIDES)
    for part, side, batch, dtype in itertools.product(("attention", "decoder"), sides, args.batches, dtypes):
        if part == "attention":
            call = attention_call(side, channels, batch, run.device)
        else:
            call = decoder_call(decoder, shape, side, batch, run.device)
        expected = None
        for name in names:
            cell = {
                "shape": run.shape.name,
                "part": part,
                "side": side,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "implementation": name,
            }
            if rows.has(**cell):
                continue
            if expected is None:
                with implementation("torch"):
                    expected = call(torch.float32).float()
            rows.append({**cell, "xformers": _version(), **measure(call, name, dtype, expected, run, args.repeats)})


def measure(
    call: Callable[[torch.dtype], Tensor], name: str, dtype: torch.dtype, expected: Tensor, run: Run, repeats: int
) -> dict[str, object]:
    """Milliseconds, and how far the result is from the expected one; or why there is none."""
    figures: dict[str, object] = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "largest_difference"), "")
    try:
        with implementation(name):
            difference = float((call(dtype).float() - expected).abs().max())
            p20, p50, p80 = (1000 * seconds for seconds in times(lambda: call(dtype), run.device, repeats))
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        return {**figures, "refused": str(error).strip().splitlines()[0][:200]}
    return {
        "ms_p20": rounded(p20),
        "ms_p50": rounded(p50),
        "ms_p80": rounded(p80),
        "largest_difference": rounded(difference, 2),
        "refused": "",
    }


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Within, the pixel decoder's attention is of that name. Raises ImportError where it is not installed."""
    found = attention._xformers_attention
    if name == "xformers" and found() is None:
        raise ImportError("xformers is not installed")
    if name == "torch":
        attention._xformers_attention = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        attention._xformers_attention = found


def attention_call(side: int, channels: int, batch: int, device: torch.device) -> Callable[[torch.dtype], Tensor]:
    """Attention over a map of side x side positions."""
    draws = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(batch, side * side, channels, device=device, generator=draws) for _ in range(3)]
    by_type: dict[torch.dtype, list[Tensor]] = {}

    def call(dtype: torch.dtype) -> Tensor:
        if dtype not in by_type:
            by_type[dtype] = [tensor.to(dtype) for tensor in inputs]
        return attention.pixel_attention(*by_type[dtype])

    return call


def decoder_call(
    decoder: ChameleonVQ, shape: VQShape, side: int, batch: int, device: torch.device
) -> Callable[[torch.dtype], Tensor]:
    """All of the decoder, codes to pixels; it stays as it is, float32."""
    draws = torch.Generator().manual_seed(0)
    codes = torch.randint(shape.num_codes, (batch, side, side), generator=draws).to(device)
    by_type: dict[torch.dtype, ChameleonVQ] = {torch.float32: decoder}

    def call(dtype: torch.dtype) -> Tensor:
        if dtype not in by_type:
            by_type[dtype] = copy.deepcopy(decoder).to(dtype)
        return by_type[dtype].decode(codes)

    return call


def decoder_shape(run: Run) -> VQShape:
    """Of the run's checkpoint."""
    from transformers import ChameleonConfig

    config: Any = ChameleonConfig.from_pretrained(run.checkpoint)
    return vq_shape(run.checkpoint, config)


def random_decoder(shape: VQShape, device: torch.device) -> ChameleonVQ:
    """With weights as PyTorch's layers begin with."""
    torch.manual_seed(0)
    return ChameleonVQ(shape).eval().to(device)


def _version() -> str:
    try:
        return version("xformers")
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"pixels.py: error: {error}")
