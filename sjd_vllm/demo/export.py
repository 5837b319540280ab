"""Writes the checkpoint folder: a standard Hugging Face checkpoint with the autoencoder and the scorer beside it."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from sjd_vllm.demo import tokens
from sjd_vllm.demo.landscapes import IMAGE_SIZE
from sjd_vllm.demo.scorer import Scorer
from sjd_vllm.models.demo.vq import DemoVQ

EXAMPLES = [
    "a calm lake at sunset, a red house on the left, snowy mountains",
    "a sailboat in the middle, still water, green hills, drifting clouds, dawn",
    "night, a starry sky, the moon on the right, rocky peaks, a snowy field, three pine trees at left",
    "a sandy desert at noon, a white cottage on the right, brown cliffs, a cloudless sky",
    "a grassy meadow, a small blue house in the center, rolling hills, early morning, the sun to the left",
    "white peaks behind a calm lake, pines on the right, dusk, a clear sky, the sun at left",
]
DEFAULTS = {"temperature": 1.0, "top_k": 100, "top_p": 1.0, "guidance_scale": 3.0}


def sjd_config() -> dict[str, Any]:
    """What `config.json` holds under the key "sjd": all that decoding needs to know about the image tokens."""
    return {
        "family": "demo",
        "image_token_start": tokens.IMAGE_START,
        "num_image_tokens": tokens.NUM_CODES,
        "boi_token_id": tokens.BOI_ID,
        "eol_token_id": tokens.EOL_ID,
        "eoi_token_id": tokens.EOI_ID,
        "grid": [tokens.GRID, tokens.GRID],
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "fewer_rows": [12, 8],  # 4:3 and 2:1, the upper part of a picture
        "defaults": DEFAULTS,
        "examples": EXAMPLES,
    }


def export_checkpoint(model: LlamaForCausalLM, vq: DemoVQ, scorer: Scorer, folder: Path) -> None:
    """Write everything in float16 and put it in the place of `folder` in one move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".checkpoint-") as scratch:
        fresh = Path(scratch) / "fresh"
        model.to(torch.float16).save_pretrained(fresh)
        model.float()
        _add_to_json(fresh / "config.json", {"sjd": sjd_config()})
        GenerationConfig(
            bos_token_id=tokens.BOS_ID,
            pad_token_id=tokens.PAD_ID,
            eos_token_id=tokens.EOI_ID,
            do_sample=True,
            temperature=DEFAULTS["temperature"],
            top_k=DEFAULTS["top_k"],
            max_new_tokens=tokens.NUM_GENERATED,
        ).save_pretrained(fresh)
        tokens.build_tokenizer().save_pretrained(fresh)
        # The name that all versions of Transformers know.
        _add_to_json(fresh / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        vq.save_pretrained(fresh / "vq")
        scorer.save_pretrained(fresh / "scorer")
        if folder.exists():
            shutil.move(folder, Path(scratch) / "old")
        fresh.rename(folder)


def _add_to_json(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")
