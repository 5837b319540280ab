"""Trains the scorer on real pictures and their VQ reconstructions, with light noise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from sjd_vllm.demo import parallel
from sjd_vllm.demo.captions import ATTRIBUTES
from sjd_vllm.demo.encode import to_pixels
from sjd_vllm.demo.loop import cosine_with_warmup, run_steps, set_learning_rate
from sjd_vllm.demo.pool import IndexStream
from sjd_vllm.demo.scorer import Scorer, ScorerConfig
from sjd_vllm.models.demo.vq import DemoVQ


@dataclass(frozen=True)
class ScorerTrainingConfig:
    """How the scorer is trained.

    Attributes:
        num_steps: steps.
        batch_size: pictures per step; half of them are reconstructed from their codes.
        learning_rate: peak of AdamW's.
        noise: greatest standard deviation of the noise, in units of [-1, 1].
    """

    num_steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    noise: float = 0.06
    seed: int = 3


def train_scorer(
    vq: DemoVQ, images: np.ndarray, codes: np.ndarray, labels: np.ndarray, folder: Path, config: ScorerTrainingConfig
) -> Scorer:
    """Train and return the scorer; state is kept in `folder`.

    Inside `parallel.run_workers` each process takes its share of every batch.

    Args:
        vq: turns codes into reconstructions.
        images: uint8 [N, 3, 96, 96].
        codes: uint16 [N, 16, 16], of the same pictures.
        labels: int64 [N, 7].
    """
    torch.manual_seed(config.seed)
    scorer = Scorer(ScorerConfig())
    optimizer = torch.optim.AdamW(scorer.parameters(), weight_decay=0.02)
    index_stream = IndexStream(len(images), config.batch_size, config.seed)

    def step_fn(step: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 64 + parallel.rank())
        chosen = index_stream.at(step)[parallel.rank() :: parallel.num_workers()]
        half = len(chosen) // 2
        with torch.autocast("cpu", torch.bfloat16):
            reconstructed = vq.decode(torch.from_numpy(codes[chosen[:half]].astype(np.int64))).float()
        pixels = torch.cat([reconstructed, to_pixels(images[chosen[half:]])])
        strength = config.noise * torch.rand(len(pixels), 1, 1, 1, generator=generator)
        pixels = pixels + strength * torch.randn(pixels.shape, generator=generator)
        targets = torch.from_numpy(labels[chosen])
        set_learning_rate(optimizer, config.learning_rate * cosine_with_warmup(step, config.num_steps, 50))
        with torch.autocast("cpu", torch.bfloat16):
            logits = scorer(pixels)
        loss = sum(
            F.cross_entropy(logits[name].float(), targets[:, i], ignore_index=-1) for i, name in enumerate(ATTRIBUTES)
        )
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(scorer.parameters())
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        return {"nats": float(loss.detach()) / len(ATTRIBUTES)}

    run_steps("scorer", folder / "scorer.pt", config.num_steps, {"scorer": scorer, "optimizer": optimizer}, step_fn)
    return scorer.eval()
