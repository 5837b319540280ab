"""The token ids of the demo model and the format of its sequences.

A sequence is `<bos> word ... word <boi>`, then 16 rows of 16 codes with `<eol>` behind each, then `<eoi>`.
The unconditional prompt of classifier-free guidance is `<bos> <boi>`.

    id 0..3      <pad> <bos> <unk> <boi>
    from 4       the words of captions, then the phrases of place, then unused ids
    126, 127     <eol> <eoi>
    128..1151    <img0> ... <img1023>

A phrase of place is one token: "on the left" becomes `light_left` behind the sun or the moon, else `object_left`. Read
word by word, "left" would have to be bound to its noun by attention, which a model of this size learns last.
"""

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sjd_vllm.demo.captions import vocabulary

GRID = 16  # codes per row, and rows per picture
NUM_CODES = 1024
PAD_ID, BOS_ID, UNK_ID, BOI_ID = range(4)
EOL_ID, EOI_ID, IMAGE_START = 126, 127, 128
VOCAB_SIZE = IMAGE_START + NUM_CODES
NUM_GENERATED = GRID * (GRID + 1) + 1  # codes, ends of rows and the end of the image


_PLACE_WORDS = {"left": "left", "center": "cent(?:er|re)|middle", "right": "right"}
_PLACE_PHRASES = {
    # Behind the sun or the moon the place is that of the light; any other place, tried second, is the object's.
    f"{kind}_{place}": rf"{behind}(?:\b(?:on|at|to|in) )?(?:\bthe )?\b(?:{words})\b"
    for kind, behind in (("light", "(?<=sun |moon |sun is |moon is )"), ("object", ""))
    for place, words in _PLACE_WORDS.items()
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ignores case and punctuation and adds `<bos>` and `<boi>` around a caption."""
    special = {"<pad>": PAD_ID, "<bos>": BOS_ID, "<unk>": UNK_ID, "<boi>": BOI_ID, "<eol>": EOL_ID, "<eoi>": EOI_ID}
    words = [*vocabulary(), *_PLACE_PHRASES]
    if BOI_ID + len(words) >= EOL_ID:
        raise ValueError(f"{len(words)} caption words do not fit below the image tokens; move EOL_ID up")
    ids = special | {word: BOI_ID + 1 + i for i, word in enumerate(words)}
    ids |= {f"<unused{i}>": i for i in range(BOI_ID + 1 + len(words), EOL_ID)}
    ids |= {f"<img{code}>": IMAGE_START + code for code in range(NUM_CODES)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\w]+"), " "),
            *(normalizers.Replace(Regex(pattern), token) for token, pattern in _PLACE_PHRASES.items()),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <boi>", special_tokens=[("<bos>", BOS_ID), ("<boi>", BOI_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eoi>",
        additional_special_tokens=["<boi>", "<eol>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def image_ids(codes: np.ndarray) -> np.ndarray:
    """Token ids that follow `<boi>`: codes int [B, 16, 16] to int64 [B, 273]."""
    ends_of_rows = np.full((*codes.shape[:2], 1), EOL_ID, np.int64)
    rows = np.concatenate([codes.astype(np.int64) + IMAGE_START, ends_of_rows], 2).reshape(len(codes), -1)
    return np.concatenate([rows, np.full((len(codes), 1), EOI_ID, np.int64)], 1)


def codes_of(ids: np.ndarray) -> np.ndarray:
    """Inverse of `image_ids`: int [B, 273] to int64 [B, 16, 16].

    Raises:
        ValueError: when an id in a place of a code is no image token.
    """
    codes = np.asarray(ids)[:, :-1].reshape(len(ids), GRID, GRID + 1)[..., :GRID].astype(np.int64) - IMAGE_START
    if codes.min() < 0 or codes.max() >= NUM_CODES:
        raise ValueError(f"image tokens are {IMAGE_START}..{VOCAB_SIZE - 1}, but another id stands where a code should")
    return codes
