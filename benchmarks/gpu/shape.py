"""Checkpoints that have a shape and no weights: Lumina-mGPT 7B, and one small enough for a CPU.

The folder holds config.json, tokenizer.json and one safetensors file whose header names every tensor; the numbers are a
hole in that file, which takes no room on the disk. So whatever reads headers alone (`sjd-vllm check`, `sjd-vllm plan`,
the checks at start) finds a whole checkpoint, and an engine is started with `load_format="dummy"`.

The large shape is that of facebook/chameleon-7b, whose fields are the defaults of Transformers' ChameleonConfig, with
the pictures of Alpha-VLLM/Lumina-mGPT-7B-512: 32 x 32 codes among 8192, each row ended by a token. Codes have the ids
from 4 on, as they do there; the ids of the other tokens are ours.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SIZE_TOKENS = range(8800, 8865)  # <reserved08800> and so on, sides of pictures in units of two codes


@dataclass(frozen=True)
class Shape:
    """Figures of a checkpoint.

    Attributes:
        side: pixels of a picture's side.
        grid: codes of a picture's side.
        num_codes: K.
        vocab_size: V.
        config, vq_config: fields of Transformers' ChameleonConfig that differ from its defaults.
    """

    name: str
    side: int
    grid: int
    num_codes: int
    vocab_size: int
    config: dict[str, Any]
    vq_config: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """T, tokens of a picture: codes, an end of each row, an end of all."""
        return self.grid * (self.grid + 1) + 1


LARGE = Shape("lumina-mgpt-7b-shape", 512, 32, 8192, 65536, {}, {})
SMALL = Shape(
    "lumina-mgpt-small-shape",
    side=16,
    grid=8,
    num_codes=64,
    vocab_size=192,
    config={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    vq_config={
        "embed_dim": 8,
        "latent_channels": 8,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
    },
)


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """Write the folder unless it is there already; returns it."""
    from transformers import ChameleonConfig

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary(shape)
    config = ChameleonConfig(
        vocab_size=shape.vocab_size,
        vocabulary_map=vocabulary,
        vq_config={"num_embeddings": shape.num_codes, **shape.vq_config},
        **shape.config,
    )
    fields = {
        **config.to_dict(),
        "architectures": ["ChameleonXLLMXForConditionalGeneration"],
        "sjd": {"target_size": shape.side},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    _write_tokenizer(folder / "tokenizer.json", vocabulary)
    _write_hollow(folder / "model.safetensors", _tensors(folder, config))
    return folder


def _vocabulary(shape: Shape) -> dict[str, int]:
    """Names and ids of all tokens."""
    codes = (
        "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z" for code in range(shape.num_codes)
    )
    reserved = (f"<reserved{number:05d}>" for number in (8706, 8799, *_SIZE_TOKENS))
    names = ["<s>", "<pad>", "</s>", "<unk>", *codes, "<eoss>", "<racm3:break>", "<image>", *reserved]
    names += [f"<filler{index}>" for index in range(shape.vocab_size - len(names))]
    return {name: index for index, name in enumerate(names)}


def _write_tokenizer(file: Path, vocabulary: dict[str, int]) -> None:
    """A word is a token; none of the vocabulary is one, so prompts are as long as their words are many."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    tokenizer: Any = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(file))


def _tensors(folder: Path, config: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor by name: the decoder's in bfloat16, the autoencoder's in float32."""
    import torch

    from sjd_vllm.models.chameleon.vq import ChameleonVQ, vq_shape
    from sjd_vllm.models.chameleon.weights import VQ_PREFIX, decoder_shapes

    with torch.device("meta"):
        autoencoder = ChameleonVQ(vq_shape(folder, config)).state_dict()
    return {
        **{name: ("BF16", shape) for name, shape in decoder_shapes(config).items()},
        **{VQ_PREFIX + name: ("F32", tuple(tensor.shape)) for name, tensor in autoencoder.items()},
    }


def _write_hollow(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file whose numbers are a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in tensors.items():
        begin, size = end, {"BF16": 2, "F32": 4}[kind]
        for length in shape:
            size *= length
        end = begin + size
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(content)) + content)
        out.truncate(8 + len(content) + end)
