"""Training at a tiny scale: a killed run goes on to where an unbroken one ends, and every stage fits the next."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sjd_vllm.demo import loop, train, train_decoder
from sjd_vllm.demo.encode import encode_pool, load_codes
from sjd_vllm.demo.pool import render_pool
from sjd_vllm.models.demo.vq import DemoVQ, DemoVQConfig

TINY_VQ = DemoVQConfig(
    code_dim=4, fine_channels=8, coarse_channels=8, num_encoder_blocks=1, num_decoder_blocks=1, pixel_channels=4
)
TINY_DECODER = train_decoder.DecoderSize(hidden_size=64, num_layers=1, intermediate_size=64)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    render_pool(folder, 12, seed=0, num_workers=1)
    return folder


def test_a_killed_run_ends_where_an_unbroken_one_ends(pool: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    torch.manual_seed(0)
    encode_pool(DemoVQ(TINY_VQ), pool, tmp_path / "codes")
    codes, labels = load_codes(tmp_path / "codes")
    config = train_decoder.DecoderTrainingConfig(num_steps=6, batch_size=4)

    def run(name: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return train_decoder.train_decoder(codes, labels, folder, config, TINY_DECODER).state_dict()

    unbroken = run("unbroken")
    calls = []

    def forward_killed_in_step_3(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    original = train_decoder.DecoderInTraining.forward
    monkeypatch.setattr(train_decoder.DecoderInTraining, "forward", forward_killed_in_step_3)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    resumed = run("killed")
    assert len(calls) == 4 + 4  # steps 0 to 2 and the kill, then 2 to 5: nothing saved is done twice
    for name, tensor in unbroken.items():
        assert torch.equal(tensor, resumed[name]), name


def test_all_stages_write_a_checkpoint_that_loads(tmp_path: Path) -> None:
    config = train.TrainingConfig(
        workdir=tmp_path / "work",
        checkpoint=tmp_path / "checkpoint",
        num_images=16,
        num_workers=1,
        vq_size=TINY_VQ,
        decoder_size=TINY_DECODER,
    )
    config = replace(
        config,
        vq=replace(config.vq, num_steps=4, num_sharpen_steps=2, num_continuous_steps=2, batch_size=4),
        decoder=replace(config.decoder, num_steps=2, batch_size=4),
        scorer=replace(config.scorer, num_steps=2, batch_size=4),
    )
    train.train(config)
    model = AutoModelForCausalLM.from_pretrained(config.checkpoint)
    assert model.config.sjd["family"] == "demo"
    assert model.config.vocab_size == model.lm_head.out_features
    before = (config.workdir / "decoder.pt").stat().st_mtime_ns
    train.train(config)
    assert (config.workdir / "decoder.pt").stat().st_mtime_ns == before


def test_a_work_folder_takes_one_configuration_only(tmp_path: Path) -> None:
    config = train.parse_arguments(["--workdir", str(tmp_path), "--decoder-steps", "7"])
    assert config.decoder.num_steps == 7
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="another configuration"):
        train.train(config)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [train_decoder.trapezoid(step, 1000, 0.4) for step in range(1000)]
    assert rates[0] < 0.02
    assert rates[300] == 1.0
    assert 0 < rates[-1] < 0.01
