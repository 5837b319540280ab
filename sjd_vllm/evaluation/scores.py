"""FID and CLIP score of a run's pictures, by torchmetrics and Transformers.

FID is an optional extra: `pip install 'sjd-vllm[eval]'`. (torchmetrics 1.9 has a CLIP score too; it does not
work with Transformers 5.)

Both need weights that are not in this package. FID: Inception-v3 as torch-fidelity has it
(`pt_inception-2015-12-05-6726825d.pth`, fetched at first use). CLIP score: a CLIP checkpoint of Transformers, by folder
or by its name on the Hugging Face hub (`openai/clip-vit-large-patch14`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sjd_vllm.config import ConfigError
from sjd_vllm.evaluation.run_folder import RunFolder

RESULTS = "scores.json"
SCORE_NAMES = ("clip", "fid")
# What each score of the suites needs, told when it is not computed here.
NEEDS = {
    "clip": "a CLIP checkpoint (--clip-model FOLDER or NAME)",
    "fid": "a folder of real pictures (--fid-reference FOLDER), torchmetrics, torch-fidelity and its Inception-v3 "
    "weights",
    "geneval": "GenEval's own code, mmdetection and its Mask2Former weights (evaluation/download_models.sh)",
    "t2i-compbench": "T2I-CompBench++'s own code with the weights of BLIP-VQA, UniDet and CLIP (its Readme)",
}
_PICTURE_FILES = ("*.png", "*.jpg", "*.jpeg")
_BATCH = 16


@torch.inference_mode()
def clip_score(run: RunFolder, label: str, model: str) -> float:
    """Mean CLIP score (100 times the cosine, at least 0) of a method's pictures and their prompts."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        clip, processor = CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError("clip_model", f"no CLIP checkpoint {model!r}: {error}") from error
    prompts, records = run.prompts, run.by_method()[label]
    total = 0.0
    for start in range(0, len(records), _BATCH):
        batch = records[start : start + _BATCH]
        inputs = processor(
            text=[prompts[record.prompt_index].text for record in batch],
            images=[Image.open(run.path / record.path).convert("RGB") for record in batch],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        outputs = clip(**inputs)  # its embeddings have norm 1
        total += float((outputs.image_embeds * outputs.text_embeds).sum(-1).clamp(min=0).sum())
    return 100 * total / len(records)


def fid_score(run: RunFolder, label: str, reference: Path, feature: int | nn.Module = 2048) -> float:
    """Frechet distance of a method's pictures from those in a folder.

    feature: what torchmetrics' FrechetInceptionDistance takes; 2048 is the usual FID.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=feature, normalize=False)
    except ImportError as error:  # torchmetrics itself, or torch-fidelity, which it asks for
        raise _missing("fid", error) from error
    real = sorted(path for pattern in _PICTURE_FILES for path in reference.rglob(pattern))
    if len(real) < 2:
        raise ConfigError("fid_reference", f"{str(reference)!r} holds {len(real)} pictures (PNG, JPEG); FID needs two.")
    made = [run.path / record.path for record in run.by_method()[label]]
    size = Image.open(made[0]).size
    for paths, is_real in ((real, True), (made, False)):
        for batch in _batches(paths, size):
            metric.update(batch, real=is_real)
    return float(metric.compute())


def score_results(
    run: RunFolder, names: Sequence[str], *, clip_model: str | None, fid_reference: Path | None
) -> dict[str, Any]:
    """The scores asked for, by method; also written to the run folder.

    Raises ConfigError, which says what is missing.
    """
    results: dict[str, Any] = run.read(RESULTS) or {}
    for name in names:
        for method in run.methods:
            own = results.setdefault(method.label, {})
            if name == "clip":
                own[name] = clip_score(run, method.label, _given("clip", clip_model))
            else:
                own[name] = fid_score(run, method.label, Path(_given("fid", fid_reference)))
    run.write(RESULTS, results)
    return results


def check_scores(names: Sequence[str], clip_model: str | None, fid_reference: str | None) -> None:
    """Raise ConfigError before any decoding where a score lacks what it needs."""
    for name in names:
        _given(name, clip_model if name == "clip" else fid_reference)
        if name == "fid" and find_spec("torchmetrics") is None:
            raise _missing(name, "no torchmetrics")


def _given(name: str, value: Any) -> Any:
    if value is None:
        raise ConfigError("score", f"the score {name} needs {NEEDS[name]}.")
    return value


def _missing(name: str, error: object) -> ConfigError:
    return ConfigError(
        "score", f"the score {name} needs {NEEDS[name]}; pip install 'sjd-vllm[eval]' brings the packages ({error})."
    )


def _picture(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    image = Image.open(path).convert("RGB")
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def _batches(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Tensor]:
    for start in range(0, len(paths), _BATCH):
        yield torch.stack([_picture(path, size) for path in paths[start : start + _BATCH]])
