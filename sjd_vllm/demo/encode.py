"""Turns the pictures of the pool into codes, chunk by chunk."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sjd_vllm.demo import parallel
from sjd_vllm.models.demo.vq import DemoVQ

_BATCH_SIZE = 50


def encode_pool(vq: DemoVQ, pool_folder: Path, codes_folder: Path) -> None:
    """Write the codes of all pictures; chunks that are there already are kept.

    Inside `parallel.run_workers` each process takes its share of the chunks.

    Args:
        vq: the trained autoencoder.
        pool_folder: where `pool.render_pool` wrote its chunks.
        codes_folder: where to write one file of codes per chunk.
    """
    codes_folder.mkdir(parents=True, exist_ok=True)
    chunks = sorted(pool_folder.glob("chunk-????.npz"))[parallel.rank() :: parallel.num_workers()]
    for chunk in tqdm(chunks, "tokens", disable=parallel.rank() != 0, unit="chunk"):
        path = codes_folder / chunk.name
        if path.exists():
            continue
        pool = np.load(chunk)
        unfinished = path.with_suffix(".tmp.npz")
        np.savez(unfinished, codes=encode(vq, pool["images"]), labels=pool["labels"])
        unfinished.rename(path)


def load_codes(codes_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All codes, uint16 [N, 16, 16], and their labels, int64 [N, 7]."""
    chunks = [np.load(path) for path in sorted(codes_folder.glob("chunk-????.npz"))]
    return np.concatenate([chunk["codes"] for chunk in chunks]), np.concatenate([chunk["labels"] for chunk in chunks])


@torch.no_grad()
def encode(vq: DemoVQ, images: np.ndarray) -> np.ndarray:
    """Codes of pictures: uint8 [N, 3, 96, 96] to uint16 [N, 16, 16]."""
    codes = []
    for start in range(0, len(images), _BATCH_SIZE):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vq.encoder(to_pixels(images[start : start + _BATCH_SIZE]))
        codes.append(vq.nearest(latents).numpy().astype(np.uint16))  # compared in float32
    return np.concatenate(codes)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, 3, H, W] to float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """Inverse of `to_pixels`, with rounding and clipping."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, averaged over pictures [B, 3, H, W] in [-1, 1]."""
    squared_error = (output.clamp(-1, 1) - target).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / squared_error)).mean())
