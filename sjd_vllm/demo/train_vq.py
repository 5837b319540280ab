"""Trains the VQ autoencoder in two phases.

First encoder, codebook and decoder learn to reconstruct (VQ-VAE: van den Oord et al. 2017, codebook by moving
averages with restart of dead codes). Then the encoder and the codebook are frozen, so that codes keep their meaning,
and the decoder alone is sharpened against a patch discriminator (VQGAN: Esser et al. 2021).

Inside `parallel.run_workers` each process takes its share of every batch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sjd_vllm.demo import parallel
from sjd_vllm.demo.encode import psnr, to_pixels
from sjd_vllm.demo.loop import cosine_with_warmup, run_steps, set_learning_rate
from sjd_vllm.demo.pool import IndexStream
from sjd_vllm.models.demo.vq import DemoVQ, DemoVQConfig


@dataclass(frozen=True)
class VQTrainingConfig:
    """How the autoencoder is trained.

    Attributes:
        num_steps: steps of reconstruction.
        num_sharpen_steps: steps of the second, adversarial phase.
        num_continuous_steps: steps before the codebook is put in, initialised from the latents seen by then.
        batch_size: pictures per step.
        learning_rate: peak of Adam's, in the first phase.
        sharpen_learning_rate: peak of Adam's for decoder and discriminator.
        commitment: weight of the pull of latents towards their codes.
        codebook_decay: of the moving averages, per step.
        dead_below: a code used fewer times per step than this, on average, is restarted at a random latent.
        adversarial_share: norm of the adversarial gradient as a share of that of the reconstruction gradient.
    """

    num_steps: int = 2200
    num_sharpen_steps: int = 1000
    num_continuous_steps: int = 150
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    sharpen_learning_rate: float = 4e-4
    commitment: float = 0.25
    codebook_decay: float = 0.98
    dead_below: float = 0.4
    adversarial_share: float = 0.7
    seed: int = 1


class CodebookAverages(nn.Module):
    """Moving averages of how often each code is used and of the latents assigned to it."""

    def __init__(self, vq: DemoVQ, config: VQTrainingConfig) -> None:
        super().__init__()
        self.decay, self.dead_below = config.codebook_decay, config.dead_below
        self.register_buffer("counts", torch.ones(vq.config.num_codes))
        self.register_buffer("sums", vq.codebook.clone())

    @torch.no_grad()
    def start_from(self, vq: DemoVQ, latents: Tensor, generator: torch.Generator) -> None:
        """Put every code on a latent of its own: latents [N, C], N >= K."""
        chosen = torch.randperm(len(latents), generator=generator)[: len(vq.codebook)]
        vq.codebook.copy_(parallel.from_first_worker(latents[chosen]))
        self.counts.fill_(1)
        self.sums.copy_(vq.codebook)

    @torch.no_grad()
    def update(self, vq: DemoVQ, latents: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Move each code towards the mean of the latents [N, C] that chose it (codes [N]); restart dead ones."""
        counts = parallel.add_up(torch.bincount(codes, minlength=len(vq.codebook)).float())
        sums = parallel.add_up(torch.zeros_like(self.sums).index_add_(0, codes, latents))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = (self.counts < self.dead_below).nonzero().flatten()
        chosen = torch.randperm(len(latents), generator=generator)[: len(dead)]
        self.sums[dead], self.counts[dead] = parallel.from_first_worker(latents[chosen]), 1.0
        vq.codebook.copy_(self.sums / self.counts[:, None])


class PatchDiscriminator(nn.ModuleList):
    """Judges overlapping patches; its inner maps also serve as features to be matched."""

    def __init__(self) -> None:
        super().__init__(
            [
                nn.Conv2d(3, 32, 4, stride=2, padding=1),
                nn.Conv2d(32, 64, 4, stride=2, padding=1),
                nn.Conv2d(64, 128, 3, padding=1),
                nn.Conv2d(128, 1, 3, padding=1),
            ]
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels [B, 3, H, W] to the maps of all layers; the last is the verdict [B, 1, H / 4, W / 4]."""
        maps = []
        for layer in self:
            pixels = layer(F.leaky_relu(pixels, 0.2) if maps else pixels)
            maps.append(pixels)
        return maps


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared error of pixels, and absolute error of differences between neighbours (edges)."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


def train_reconstruction(images: np.ndarray, folder: Path, config: VQTrainingConfig, vq_config: DemoVQConfig) -> DemoVQ:
    """First phase. images: uint8 [N, 3, H, W]. State is kept in `folder`."""
    torch.manual_seed(config.seed)
    vq = DemoVQ(vq_config)
    averages = CodebookAverages(vq, config)
    optimizer = torch.optim.AdamW(vq.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    index_stream = IndexStream(len(images), config.batch_size, config.seed)

    def step_fn(step: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chosen = index_stream.at(step)[parallel.rank() :: parallel.num_workers()]
        pixels = mirror_some(to_pixels(images[chosen]), generator)
        set_learning_rate(optimizer, config.learning_rate * cosine_with_warmup(step, config.num_steps, 100))
        with torch.autocast("cpu", torch.bfloat16):
            latents = vq.encoder(pixels)
        latents = latents.float()
        flat = latents.detach().movedim(1, -1).flatten(0, 2)
        if step == config.num_continuous_steps:
            averages.start_from(vq, flat, generator)
        if step < config.num_continuous_steps:
            quantised, commitment = latents, latents.square().mean() * 1e-3
        else:
            codes = vq.nearest(latents.detach())
            vectors = vq.vectors(codes)
            commitment = config.commitment * F.mse_loss(latents, vectors)
            quantised = latents + (vectors - latents).detach()  # straight-through gradient
            averages.update(vq, flat, codes.flatten(), generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = vq.decoder(quantised)
        output = output.float()
        loss = reconstruction_loss(output, pixels) + commitment
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(vq.parameters())
        nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        return {
            "loss": float(loss.detach()),
            "psnr": psnr(output.detach(), pixels),
            "codes": _perplexity(averages.counts),
        }

    parts = {"vq": vq, "averages": averages, "optimizer": optimizer}
    run_steps("vq", folder / "vq.pt", config.num_steps, parts, step_fn)
    return vq


def sharpen_decoder(vq: DemoVQ, images: np.ndarray, folder: Path, config: VQTrainingConfig) -> DemoVQ:
    """Second phase: only the decoder of `vq` changes. images: uint8 [N, 3, H, W]."""
    torch.manual_seed(config.seed + 1)
    vq.encoder.requires_grad_(False)
    discriminator = PatchDiscriminator()
    decoder_optimizer = torch.optim.AdamW(vq.decoder.parameters(), betas=(0.5, 0.99), weight_decay=1e-4)
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), betas=(0.5, 0.99))
    index_stream = IndexStream(len(images), config.batch_size, config.seed)

    def step_fn(step: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(config.seed * 2_000_003 + step)
        chosen = index_stream.at(step)[parallel.rank() :: parallel.num_workers()]
        pixels = mirror_some(to_pixels(images[chosen]), generator)
        rate = config.sharpen_learning_rate * cosine_with_warmup(step, config.num_sharpen_steps, 50)
        set_learning_rate(decoder_optimizer, rate)
        set_learning_rate(discriminator_optimizer, rate)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vq.encoder(pixels)
        vectors = vq.vectors(vq.nearest(latents)).detach()
        with torch.autocast("cpu", torch.bfloat16):
            output = vq.decoder(vectors)
            real, fake = discriminator(pixels), discriminator(output.detach())
        hinge = F.relu(1 - real[-1].float()).mean() + F.relu(1 + fake[-1].float()).mean()
        discriminator_optimizer.zero_grad()
        hinge.backward()
        parallel.average_gradients(discriminator.parameters())
        discriminator_optimizer.step()

        output = output.float()
        with torch.autocast("cpu", torch.bfloat16):
            fake = discriminator(output)
        matching = sum(F.l1_loss(a.float(), b.detach().float()) for a, b in zip(fake[:-1], real[:-1], strict=True))
        adversarial = matching - fake[-1].float().mean()
        reconstruction = reconstruction_loss(output, pixels)
        (wanted,) = torch.autograd.grad(reconstruction, output, retain_graph=True)
        (pushed,) = torch.autograd.grad(adversarial, output, retain_graph=True)
        # Scaling one gradient to the norm of the other keeps the balance whatever the discriminator's scale is.
        weight = config.adversarial_share * wanted.norm() / (pushed.norm() + 1e-8)
        decoder_optimizer.zero_grad()
        output.backward(wanted + weight * pushed)
        parallel.average_gradients(vq.decoder.parameters())
        nn.utils.clip_grad_norm_(vq.decoder.parameters(), 1.0)
        decoder_optimizer.step()
        return {
            "reconstruction": float(reconstruction.detach()),
            "psnr": psnr(output.detach(), pixels),
            "discriminator": float(hinge.detach()),
        }

    parts = {
        "vq": vq,
        "discriminator": discriminator,
        "decoder_optimizer": decoder_optimizer,
        "discriminator_optimizer": discriminator_optimizer,
    }
    run_steps("sharpen", folder / "sharpen.pt", config.num_sharpen_steps, parts, step_fn)
    return vq


def mirror_some(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each picture of [B, 3, H, W] with probability one half."""
    is_mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    return torch.where(is_mirrored, pixels.flip(-1), pixels)


def _perplexity(counts: Tensor) -> float:
    """Effective number of codes in use."""
    probs = counts / counts.sum()
    return float(torch.exp(-(probs * probs.clamp(min=1e-12).log()).sum()))
