"""Scores the demo model on captions it never saw: `python -m sjd_vllm.demo.evaluate`.

Samples one picture per caption and guidance scale with plain sampling through Transformers, lets the scorer read the
attributes back, and sets beside them what the scorer reads off real pictures and off their VQ reconstructions of the
same scenes: the ceiling. Prints a table and writes `scores.json` and contact sheets.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sjd_vllm.demo import checkpoint_path
from sjd_vllm.demo.captions import captioned_scenes
from sjd_vllm.demo.encode import psnr, to_images, to_pixels
from sjd_vllm.demo.landscapes import render
from sjd_vllm.demo.sampling import sample_codes
from sjd_vllm.demo.scorer import Scorer, accuracies
from sjd_vllm.images.sheet import contact_sheet
from sjd_vllm.models.demo.vq import DemoVQ

_NUM_ON_SHEET = 16
_ENLARGEMENT = 2


def evaluate(
    checkpoint: Path, output: Path, guidance_scales: list[float], num_captions: int, seed: int
) -> dict[str, dict[str, float]]:
    """Score a checkpoint.

    Args:
        checkpoint: folder of the model.
        output: folder for `scores.json` and the contact sheets.
        guidance_scales: one row of the table each.
        num_captions: pictures per row.
        seed: of the captions, of the real pictures and of the draws.

    Returns:
        For each row of the table, the accuracy of each attribute and their mean; the row of reconstructions also
        has their PSNR in dB.
    """
    output.mkdir(parents=True, exist_ok=True)
    vq, scorer = DemoVQ.from_pretrained(checkpoint / "vq"), Scorer.from_pretrained(checkpoint / "scorer")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    scenes, captions = zip(*captioned_scenes(num_captions, seed), strict=True)
    labels = torch.tensor([scene.labels() for scene in scenes])

    rng = np.random.default_rng(seed)
    real = to_pixels(np.stack([render(scene, rng) for scene in scenes]))
    reconstructed = vq.decode(vq.encode(real))
    scores = {
        "real pictures": accuracies(scorer.classify(real), labels),
        "VQ reconstructions": accuracies(scorer.classify(reconstructed), labels) | {"psnr": psnr(reconstructed, real)},
    }
    pairs = torch.stack([real, reconstructed], 1).flatten(0, 1)
    _save_sheet(pairs, output / "reconstructions.png")
    for scale in tqdm(guidance_scales, "guidance scales"):
        codes = sample_codes(model, tokenizer, list(captions), guidance_scale=scale, seed=seed)
        pixels = vq.decode(torch.from_numpy(codes))
        scores[f"guidance {scale:g}"] = accuracies(scorer.classify(pixels), labels)
        _save_sheet(pixels, output / f"guidance-{scale:g}.png")
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def format_table(scores: dict[str, dict[str, float]]) -> str:
    """The scores as a Markdown table."""
    columns = [name for name in next(iter(scores.values())) if name != "psnr"]
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(f"{values[name]:.3f}" for name in columns) + " |" for row, values in scores.items()
    ]
    return "\n".join(lines)


def _save_sheet(pixels: torch.Tensor, path: Path) -> None:
    images = [Image.fromarray(image.transpose(1, 2, 0)) for image in to_images(pixels[:_NUM_ON_SHEET])]
    large = [
        image.resize((image.width * _ENLARGEMENT, image.height * _ENLARGEMENT), Image.Resampling.BICUBIC)
        for image in images
    ]
    contact_sheet(large).save(path, optimize=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Score the demo model on captions it never saw.")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for scores and sheets")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0], help="guidance scales")
    parser.add_argument("--num-captions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1_000_000)
    given = parser.parse_args()
    scores = evaluate(given.checkpoint, given.output, given.guidance, given.num_captions, given.seed)
    print(format_table(scores))
    print(f"PSNR of the reconstructions: {scores['VQ reconstructions']['psnr']:.2f} dB")


if __name__ == "__main__":
    main()
