"""Retrains the demo model from nothing: `python -m sjd_vllm.demo.train`.

Stages: data, vq, tokens, sharpen, decoder, scorer, export. Each keeps its state in the work folder, so that a run which
was killed goes on where it stopped, and a stage that is finished is not done again.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers import LlamaForCausalLM

from sjd_vllm.demo import checkpoint_path, parallel
from sjd_vllm.demo.encode import encode_pool, load_codes
from sjd_vllm.demo.export import export_checkpoint
from sjd_vllm.demo.pool import load_pool, render_pool
from sjd_vllm.demo.scorer import Scorer
from sjd_vllm.demo.train_decoder import DecoderSize, DecoderTrainingConfig, train_decoder
from sjd_vllm.demo.train_scorer import ScorerTrainingConfig, train_scorer
from sjd_vllm.demo.train_vq import VQTrainingConfig, sharpen_decoder, train_reconstruction
from sjd_vllm.models.demo.vq import DemoVQ, DemoVQConfig


@dataclass(frozen=True)
class TrainingConfig:
    """A whole retraining.

    Attributes:
        workdir: where pictures, codes and training states are kept; about 1.5 GB.
        checkpoint: folder to write in the end.
        num_images: pictures to render.
        num_workers: processes, one per core. Each draws its own captions, so the weights depend on the number.
        seed: of the pictures.
    """

    workdir: Path = Path(".demo-training")
    checkpoint: Path = field(default_factory=checkpoint_path)
    num_images: int = 48000
    num_workers: int = 2
    seed: int = 0
    vq: VQTrainingConfig = field(default_factory=VQTrainingConfig)
    vq_size: DemoVQConfig = field(default_factory=DemoVQConfig)
    decoder: DecoderTrainingConfig = field(default_factory=DecoderTrainingConfig)
    decoder_size: DecoderSize = field(default_factory=DecoderSize)
    scorer: ScorerTrainingConfig = field(default_factory=ScorerTrainingConfig)


def train(config: TrainingConfig) -> None:
    """Run all stages; see the head of this file."""
    _remember(config)
    render_pool(config.workdir / "data", config.num_images, config.seed, config.num_workers)
    for stage in (vq_stage, tokens_stage, sharpen_stage, decoder_stage, scorer_stage):
        parallel.run_workers(stage, config.num_workers, config)
    export_stage(config)


def vq_stage(config: TrainingConfig) -> None:
    """Encoder, codebook and a first decoder of pixels."""
    images, _ = load_pool(config.workdir / "data")
    vq = train_reconstruction(images, config.workdir, config.vq, config.vq_size)
    if parallel.rank() == 0:
        vq.save_pretrained(config.workdir / "vq")


def tokens_stage(config: TrainingConfig) -> None:
    """The codes of all pictures, from the autoencoder as it is shipped, in half precision."""
    vq = DemoVQ.from_pretrained(config.workdir / "vq")
    encode_pool(vq, config.workdir / "data", config.workdir / "codes")


def sharpen_stage(config: TrainingConfig) -> None:
    """The final decoder of pixels."""
    images, _ = load_pool(config.workdir / "data")
    vq = sharpen_decoder(DemoVQ.from_pretrained(config.workdir / "vq"), images, config.workdir, config.vq)
    if parallel.rank() == 0:
        vq.save_pretrained(config.workdir / "vq-sharp")


def decoder_stage(config: TrainingConfig) -> None:
    """The language model of the codes."""
    codes, labels = load_codes(config.workdir / "codes")
    model = train_decoder(codes, labels, config.workdir, config.decoder, config.decoder_size)
    if parallel.rank() == 0:
        model.save_pretrained(config.workdir / "decoder")


def scorer_stage(config: TrainingConfig) -> None:
    """The judge of the results."""
    images, labels = load_pool(config.workdir / "data")
    codes, _ = load_codes(config.workdir / "codes")
    vq = DemoVQ.from_pretrained(config.workdir / "vq-sharp")
    scorer = train_scorer(vq, images, codes, labels, config.workdir, config.scorer)
    if parallel.rank() == 0:
        scorer.save_pretrained(config.workdir / "scorer")


def export_stage(config: TrainingConfig) -> None:
    """The checkpoint folder."""
    export_checkpoint(
        LlamaForCausalLM.from_pretrained(config.workdir / "decoder"),
        DemoVQ.from_pretrained(config.workdir / "vq-sharp"),
        Scorer.from_pretrained(config.workdir / "scorer"),
        config.checkpoint,
    )


def _remember(config: TrainingConfig) -> None:
    """Keep the configuration in the work folder, and refuse to go on there with another one."""
    described = json.dumps(asdict(config), indent=2, default=str) + "\n"
    path = config.workdir / "config.json"
    if path.exists() and path.read_text() != described:
        raise ValueError(
            f"{config.workdir} holds a run with another configuration (see {path}); choose another "
            "--workdir, or remove this one to start afresh"
        )
    config.workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(described)


def parse_arguments(arguments: list[str] | None = None) -> TrainingConfig:
    """Command line to configuration; what is not given keeps its default."""
    default = TrainingConfig()
    parser = argparse.ArgumentParser(description="Retrain the demo model from nothing; run again to resume.")
    parser.add_argument("--workdir", type=Path, default=default.workdir, help="pictures and training states")
    parser.add_argument("--checkpoint", type=Path, default=default.checkpoint, help="folder to write in the end")
    parser.add_argument("--num-images", type=int, default=default.num_images, help="pictures to render")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes, one per core")
    parser.add_argument("--vq-steps", type=int, default=default.vq.num_steps)
    parser.add_argument("--sharpen-steps", type=int, default=default.vq.num_sharpen_steps)
    parser.add_argument("--decoder-steps", type=int, default=default.decoder.num_steps)
    parser.add_argument("--scorer-steps", type=int, default=default.scorer.num_steps)
    given = parser.parse_args(arguments)
    return replace(
        default,
        workdir=given.workdir,
        checkpoint=given.checkpoint,
        num_images=given.num_images,
        num_workers=given.num_workers,
        vq=replace(default.vq, num_steps=given.vq_steps, num_sharpen_steps=given.sharpen_steps),
        decoder=replace(default.decoder, num_steps=given.decoder_steps),
        scorer=replace(default.scorer, num_steps=given.scorer_steps),
    )


if __name__ == "__main__":
    train(parse_arguments())
