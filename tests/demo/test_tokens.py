"""The tokenizer and the format of sequences."""

import numpy as np
import pytest

from sjd_vllm.demo import tokens
from sjd_vllm.demo.captions import captions, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.build_tokenizer()


def test_captions_need_no_unknown_token(tokenizer) -> None:
    assert tokens.UNK_ID not in tokenizer(" ".join(vocabulary()))["input_ids"]
    for ids in tokenizer(captions(500, seed=9))["input_ids"]:
        assert tokens.UNK_ID not in ids
        assert ids[0] == tokens.BOS_ID
        assert ids[-1] == tokens.BOI_ID
        assert ids.count(tokens.BOI_ID) == 1


def test_case_and_punctuation_do_not_matter(tokenizer) -> None:
    assert tokenizer("A red house, at sunset.")["input_ids"] == tokenizer("a red house at sunset")["input_ids"]
    assert tokenizer("Snow-capped mountains!")["input_ids"] == tokenizer("snow capped mountains")["input_ids"]


@pytest.mark.parametrize(
    ("caption", "place"),
    [
        ("the sun on the left", "light_left"),
        ("the moon at center", "light_center"),
        ("The sun, in the middle.", "light_center"),
        ("a boat to the right", "object_right"),
        ("pines at left", "object_left"),
        ("a red house in the centre", "object_center"),
    ],
)
def test_a_phrase_of_place_is_one_token(tokenizer, caption: str, place: str) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(caption)["input_ids"])[-2] == place


def test_unknown_words_become_unk(tokenizer) -> None:
    assert tokenizer("a purple house")["input_ids"][2] == tokens.UNK_ID


def test_an_empty_caption_is_the_unconditional_prompt(tokenizer) -> None:
    assert tokenizer("")["input_ids"] == [tokens.BOS_ID, tokens.BOI_ID]


def test_ids_are_where_the_format_says(tokenizer) -> None:
    assert len(tokenizer) == tokens.VOCAB_SIZE
    named = {
        "<pad>": tokens.PAD_ID,
        "<bos>": tokens.BOS_ID,
        "<unk>": tokens.UNK_ID,
        "<boi>": tokens.BOI_ID,
        "<eol>": tokens.EOL_ID,
        "<eoi>": tokens.EOI_ID,
        "<img0>": tokens.IMAGE_START,
        "<img1023>": tokens.VOCAB_SIZE - 1,
    }
    for token, token_id in named.items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        tokens.BOS_ID,
        tokens.EOI_ID,
        tokens.PAD_ID,
    )


def test_codes_and_ids_are_inverse() -> None:
    codes = np.random.default_rng(0).integers(0, tokens.NUM_CODES, (3, tokens.GRID, tokens.GRID))
    ids = tokens.image_ids(codes)
    assert ids.shape == (3, tokens.NUM_GENERATED)
    assert (ids == tokens.EOL_ID).sum() == 3 * tokens.GRID
    assert np.array_equal(tokens.codes_of(ids), codes)
    ids[0, 0] = tokens.EOL_ID
    with pytest.raises(ValueError, match="another id"):
        tokens.codes_of(ids)
