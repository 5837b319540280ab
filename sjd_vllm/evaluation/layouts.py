"""Folders as the scorers of GenEval and T2I-CompBench++ take them, made of hard links to the run's pictures.

GenEval (djghosh13/geneval, README, "Image generation"): a folder for each line of its metadata, named by the line's
number, with that line and `samples/0000.png`, ...

T2I-CompBench++ (Karine-Huang/T2I-CompBench, Readme, "Evaluation"): for each category a folder `samples` of files
`PROMPT_NNNNNN.png`; the number counts on through the folder and is the question_id of the results.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from sjd_vllm.evaluation.run_folder import Record, RunFolder

FOLDER = "for-scorers"
# In a file's name: no folder; and the scorers read the prompt up to the first underscore.
_UNSAFE = str.maketrans({"/": " ", "_": " ", "\0": " "})
_MAX_NAME = 240  # bytes; file systems take 255


def write_layouts(run: RunFolder) -> list[Path]:
    """Write the layout of the run's suite for every method; returns their folders, none for other suites."""
    layout = _LAYOUTS.get(run.settings["suite"])
    if layout is None:
        return []
    folders = []
    for label, records in run.by_method().items():
        folder = run.path / FOLDER / label
        shutil.rmtree(folder, ignore_errors=True)
        layout(run, records, folder)
        folders.append(folder)
    return folders


def scorer_commands(run: RunFolder) -> list[str]:
    """What to run next, with the scorers' own code and weights."""
    where = run.path.resolve() / FOLDER
    return {
        "geneval": [
            f'python evaluation/evaluate_images.py "{where}/METHOD" --outfile results.jsonl --model-path DETECTOR',
            "python evaluation/summary_scores.py results.jsonl",
        ],
        "t2i-compbench": [
            f'python BLIPvqa_eval/BLIP_vqa.py --out_dir="{where}/METHOD/CATEGORY/"    # color, shape, texture',
            f'python CLIPScore_eval/CLIP_similarity.py --outpath="{where}/METHOD/CATEGORY/"    # non_spatial',
        ],
    }.get(run.settings["suite"], [])


def _geneval(run: RunFolder, records: list[Record], folder: Path) -> None:
    prompts = run.prompts
    for record in records:
        prompt = folder / f"{record.prompt_index:05d}"
        (prompt / "samples").mkdir(parents=True, exist_ok=True)
        (prompt / "metadata.jsonl").write_text(json.dumps(prompts[record.prompt_index].source) + "\n")
        _link(run, record, prompt / "samples" / f"{record.image_index:04d}.png")


def _t2i_compbench(run: RunFolder, records: list[Record], folder: Path) -> None:
    prompts = run.prompts
    counts: dict[str, int] = {}
    for record in records:
        prompt = prompts[record.prompt_index]
        samples = folder / prompt.category / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        number = counts.get(prompt.category, 0)
        counts[prompt.category] = number + 1
        text = prompt.text.translate(_UNSAFE).encode()[:_MAX_NAME].decode(errors="ignore")
        _link(run, record, samples / f"{text}_{number:06d}.png")


_LAYOUTS: dict[str, Callable[[RunFolder, list[Record], Path], None]] = {
    "geneval": _geneval,
    "t2i-compbench": _t2i_compbench,
}


def _link(run: RunFolder, record: Record, path: Path) -> None:
    source = run.path / record.path
    try:
        path.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, path)
