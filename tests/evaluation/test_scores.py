"""FID and CLIP score on tiny random weights, against their definitions; bad input to the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sjd_vllm.config import ConfigError
from sjd_vllm.evaluation.run_folder import RunFolder
from sjd_vllm.evaluation.scores import clip_score, fid_score
from tiny_models import PAINTER_WORDS

_SEED = 2  # of a CLIP model that finds some likeness in everything


class MeanColours(nn.Module):
    """Features of a picture: the mean of each quarter's colours."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_fid_is_the_frechet_distance(finished: Path, tmp_path: Path) -> None:
    run = RunFolder.open(finished)
    rng = np.random.default_rng(0)
    for index in range(20):
        low = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(low).resize((36, 36)).save(tmp_path / f"{index}.png")
    found = fid_score(run, "coupled", tmp_path, MeanColours())

    def features(paths: list[Path]) -> np.ndarray:
        images = [torch.from_numpy(np.asarray(Image.open(path))).permute(2, 0, 1) for path in paths]
        return MeanColours()(torch.stack(images)).double().numpy()

    real = features(sorted(tmp_path.glob("*.png")))
    made = features([finished / record.path for record in run.by_method()["coupled"]])
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(made.T))
    distance = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(np.cov(real.T) + np.cov(made.T) - 2 * root.real)
    assert found == pytest.approx(distance, rel=1e-3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    ids = {token: index for index, token in enumerate([*specials, *PAINTER_WORDS])}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(ids), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**small, "image_size": 36, "patch_size": 12},
        projection_dim=16,
    )
    torch.manual_seed(_SEED)
    CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 36, "width": 36})
    CLIPProcessor(pixels, words).save_pretrained(folder)
    return folder


def test_clip_score_is_the_mean_cosine(finished: Path, clip: Path) -> None:
    run = RunFolder.open(finished)
    found = clip_score(run, "gumbel", str(clip))
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for record in run.by_method()["gumbel"]:
        with Image.open(finished / record.path) as picture, torch.inference_mode():
            text = run.prompts[record.prompt_index].text
            inputs = processor(text=[text], images=[picture.convert("RGB")], return_tensors="pt", padding=True)
            outputs = model(**inputs)
        cosines.append(float((outputs.image_embeds * outputs.text_embeds).sum()))
    assert min(cosines) > 0  # else 0 would be right for many
    assert found == pytest.approx(100 * np.mean(cosines), abs=1e-3)
    assert found == clip_score(run, "none", str(clip))  # the same pictures
    assert found != clip_score(run, "coupled", str(clip))


def test_a_missing_clip_checkpoint_is_told(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CLIP checkpoint"):
        clip_score(RunFolder.open(finished), "gumbel", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--score", "clip"], "needs a CLIP checkpoint (--clip-model"),
        (["--score", "fid"], "needs a folder of real pictures"),
        (["--score", "is"], "score must be one of clip, fid"),
        (["--methods", "couple"], "Did you mean 'coupled'"),
        (["--methods", "coupled@0"], "whole number from 1 to 128"),
        (["--methods", "coupled@x"], "whole number from 1 to 128"),
        (["--methods", "none@4"], "none has no window"),
        (["--methods", "gumbel,gumbel"], "each method can stand once"),
        (["--suite", "genval"], "Did you mean 'geneval'"),
        (["--limit", "0"], "limit must be"),
        (["--engine-args", "[]"], "engine_args must be a JSON object"),
        (["--guidance-scale", "0"], "guidance_scale must be"),
        (["--size", "1x1"], "size must be one of"),
        (["-o", "/dev/null/run"], "cannot write to '/dev/null/run'"),
    ],
)
def test_bad_input_is_told_before_the_engine_starts(
    evaluate: Callable[..., int], tmp_path: Path, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    output = [] if "-o" in arguments else ["-o", str(tmp_path / "run")]
    assert evaluate(*output, *arguments) == 2
    err = capfd.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
