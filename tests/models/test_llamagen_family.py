"""The LlamaGen family on tiny random checkpoints in the published layouts."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import Engine, engine, guided, record_preemptions, sampling
from family_harness import (
    FullLogits,
    check_greedy_picture,
    check_law,
    check_two_ranks,
    check_window_logits,
    engine_prompt,
    picture_params,
    reference_picture,
)
from PIL import Image
from reference_llamagen import ReferenceLlamaGen, reference_codes, reference_pixels
from tiny_llamagen import (
    CAPTION_ROWS,
    GRID,
    NUM_CLASSES,
    NUM_CODES,
    NUM_HEADS,
    make_tiny_llamagen,
    transformer_tensors,
    vq_tensors,
)
from transformers import AutoTokenizer, T5EncoderModel
from vllm.exceptions import VLLMValidationError

from live_server import live_server
from sjd_vllm.config import ConfigError
from sjd_vllm.images.pipeline import ImagePipeline
from sjd_vllm.images.request import ImageRequest
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.llamagen.captions import clean_caption
from sjd_vllm.models.llamagen.vq import LlamaGenVQ
from sjd_vllm.models.registry import load_family

CLASS = "3"
CAPTION = "a red house at night"
CAPTION_ID = NUM_CODES + CAPTION_ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llamagen")


@pytest.fixture(scope="module")
def classes(folder: Path) -> Path:
    return make_tiny_llamagen(folder / "c2i")


@pytest.fixture(scope="module")
def texts(folder: Path) -> Path:
    return make_tiny_llamagen(folder / "t2i", "t2i", wrapper="module")


@pytest.fixture(scope="module")
def odd_heads(folder: Path) -> Path:
    """Four heads of 20 numbers, which vLLM's attention does not take, in the mixin's layout."""
    return make_tiny_llamagen(folder / "heads", as_mixin=True, dim=80, num_heads=4)


def family_of(path: Path) -> ImageFamily:
    found = load_family(path)
    assert found is not None
    return found


def class_logits(model: ReferenceLlamaGen) -> FullLogits:
    """Of a class's id and codes."""

    def logits(token_ids: list[int]) -> torch.Tensor:
        label = token_ids[0] - NUM_CODES
        prompt = model.tensors["cls_embedding.embedding_table.weight"][label][None]
        return model.logits(prompt, torch.zeros(1, dtype=torch.bool), token_ids[1:])

    return logits


def text_logits(path: Path, *captions: str) -> FullLogits:
    """Of a caption's ids, or the unconditional ones, and codes; the caption is the one given that is as long.

    All as the authors' sample_t2i.py has it: 120 padded rows through T5, the padding moved to the front, the features
    there set to zero, and the unconditional rows under the caption's own mask.
    """
    model = ReferenceLlamaGen(transformer_tensors("t2i"), num_heads=NUM_HEADS, grid=GRID, num_prompt_rows=CAPTION_ROWS)
    tokenizer = AutoTokenizer.from_pretrained(path / "flan-t5-xl")
    encoder = T5EncoderModel.from_pretrained(path / "flan-t5-xl", dtype=torch.float32).eval()
    read = tokenizer(
        list(captions), max_length=CAPTION_ROWS, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        features = encoder(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).last_hidden_state
    lengths = read["attention_mask"].sum(dim=1).tolist()
    by_length = {length: rows[:length] for length, rows in zip(lengths, features, strict=True)}
    assert len(by_length) == len(captions)

    def logits(token_ids: list[int]) -> torch.Tensor:
        codes = [i for i in token_ids if i < NUM_CODES]
        length = len(token_ids) - len(codes)
        is_padding = torch.arange(CAPTION_ROWS) < CAPTION_ROWS - length
        if token_ids[0] == CAPTION_ID:
            rows = torch.cat([torch.zeros(CAPTION_ROWS - length, features.shape[-1]), by_length[length]])
        else:
            rows = model.tensors["cls_embedding.uncond_embedding"]
        all_logits: torch.Tensor = model.logits(model.captions(rows), is_padding, codes)
        # the harness counts rows from the prompt's first token
        return torch.cat([all_logits[:1].expand(length - 1, -1), all_logits])

    return logits


@pytest.fixture(scope="module")
def class_reference() -> FullLogits:
    return class_logits(
        ReferenceLlamaGen(transformer_tensors("c2i"), num_heads=NUM_HEADS, grid=GRID, num_prompt_rows=1)
    )


class TestClasses:
    @pytest.fixture(scope="class")
    def running(self, classes: Path) -> Iterator[Engine]:
        with engine(classes, window=8, max_num_seqs=128) as started:
            yield started

    def test_logits(
        self, running: Engine, class_reference: FullLogits, classes: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family = family_of(classes)
        check_window_logits(running, class_reference, family, family.sizes[0], CLASS, monkeypatch)

    def test_a_greedy_picture_also_on_two_ranks(
        self, running: Engine, class_reference: FullLogits, classes: Path
    ) -> None:
        family = family_of(classes)
        expected = check_greedy_picture(running, class_reference, family, family.sizes[0], CLASS)
        check_two_ranks(classes, family, family.sizes[0], CLASS, expected)

    def test_the_law(self, running: Engine, class_reference: FullLogits, classes: Path) -> None:
        family = family_of(classes)
        check_law(running, class_reference, family, family.sizes[0], CLASS)

    def test_ids_that_are_no_codes_are_never_sampled(self, running: Engine) -> None:
        """Without a grammar too, and past the end of the grid there is no place to be out of bounds at."""
        (tokens,) = running.generate([[NUM_CODES]], [sampling(GRID * GRID, seed=1)])[0]
        assert len(tokens) == GRID * GRID
        assert max(tokens) < NUM_CODES
        tokens = running.generate([[1, 2, 3, 4]], [sampling(33, seed=1)])[0][0]
        assert max(tokens) < NUM_CODES


def test_heads_that_are_continued_with_zeros(odd_heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(odd_heads)
    model = ReferenceLlamaGen(transformer_tensors("c2i", dim=80), num_heads=4, grid=GRID, num_prompt_rows=1)
    reference = class_logits(model)
    with engine(odd_heads, window=8) as running:
        check_window_logits(running, reference, family, family.sizes[0], CLASS, monkeypatch)
        check_greedy_picture(running, reference, family, family.sizes[0], CLASS)


class TestTexts:
    @pytest.fixture(scope="class")
    def running(self, texts: Path) -> Iterator[Engine]:
        with engine(texts, window=8, max_num_seqs=128) as started:
            yield started

    def test_logits(self, running: Engine, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        family = family_of(texts)
        check_window_logits(running, text_logits(texts, CAPTION), family, family.sizes[0], CAPTION, monkeypatch)

    def test_a_greedy_picture_also_on_two_ranks(self, running: Engine, texts: Path) -> None:
        family = family_of(texts)
        expected = check_greedy_picture(running, text_logits(texts, CAPTION), family, family.sizes[0], CAPTION)
        check_two_ranks(texts, family, family.sizes[0], CAPTION, expected)

    def test_the_law(self, running: Engine, texts: Path) -> None:
        family = family_of(texts)
        check_law(running, text_logits(texts, CAPTION), family, family.sizes[0], CAPTION)

    def test_captions_of_one_length_are_not_taken_for_each_other(self, running: Engine, texts: Path) -> None:
        """They have the same ids, so only their vectors keep prefix caching apart."""
        family = family_of(texts)
        size = family.sizes[0]
        long = " ".join(["red lake"] * 59)
        other = " ".join(["blue house"] * 59)
        params = [picture_params(family, size, long, temperature=0)] * 2
        outputs = running.generate([engine_prompt(family, size, caption) for caption in (long, other)], params)
        again = running.generate([engine_prompt(family, size, other)], params[:1])
        for caption, (tokens,) in zip((long, other, other), [*outputs, *again], strict=True):
            assert tokens == reference_picture(text_logits(texts, caption), family, size, caption, 3.0)
        assert outputs[0] != outputs[1]

    @pytest.mark.parametrize(
        "change",
        [
            {"prompt_token_ids": None, "prompt_is_token_ids": None},
            {"prompt_is_token_ids": [True] + [False] * 5},
            {"prompt_token_ids": [CAPTION_ID] * 5 + [3]},
            {"prompt_embeds": torch.zeros(6, 64)},
            {"prompt_embeds": None, "prompt_is_token_ids": None},
        ],
    )
    def test_vectors_and_ids_that_do_not_fit_are_refused(
        self, running: Engine, texts: Path, change: dict[str, object]
    ) -> None:
        family = family_of(texts)
        size = family.sizes[0]
        prompt = engine_prompt(family, size, CAPTION)
        assert len(prompt["prompt_token_ids"]) == 6
        changed = {name: value for name, value in {**prompt, **change}.items() if value is not None}
        with pytest.raises(VLLMValidationError, match=r"vector|prompt_embeds") as refusal:
            running.generate([changed], [picture_params(family, size, CAPTION, temperature=0)])
        assert refusal.value.parameter == "prompt_embeds"
        running.assert_nothing_left()

    def test_a_negative_prompt_without_its_vectors_is_refused(self, running: Engine, texts: Path) -> None:
        family = family_of(texts)
        size = family.sizes[0]
        params = sampling(GRID * GRID, sjd=guided(3.0, [CAPTION_ID] * 3, image_size=str(size)))
        with pytest.raises(VLLMValidationError, match="must not hold 168"):
            running.generate([engine_prompt(family, size, CAPTION)], [params])


def test_captions_in_chunks_under_preemption(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 3 to 120 rows, prefilled in pieces and taken out of a small cache, end as alone."""
    family = family_of(texts)
    size = family.sizes[0]
    captions = [" ".join(["red lake"] * n) for n in (1, 4, 13, 30, 47, 59)]
    reference = text_logits(texts, *captions)
    expected = [reference_picture(reference, family, size, caption, 3.0) for caption in captions]
    with engine(
        texts, window=8, max_num_seqs=12, max_num_batched_tokens=64, block_size=32, num_gpu_blocks_override=24
    ) as running:
        preempted = record_preemptions(running, monkeypatch)
        prompts = [engine_prompt(family, size, caption) for caption in captions]
        params = [picture_params(family, size, caption, temperature=0) for caption in captions]
        outputs = running.generate(prompts, params)
        running.assert_nothing_left()
    assert preempted
    assert [tokens for (tokens,) in outputs] == expected


def test_pictures_from_the_pipeline(texts: Path) -> None:
    """The front door: prompts as text, given rows of a picture behind a caption, pixels; the folder has no config."""
    family = family_of(texts)
    size = family.sizes[0]
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format="PNG")
    with ImagePipeline(texts, num_speculative_tokens=8, max_batch_size=2, dtype="float32") as pipeline:
        result = pipeline.generate(CAPTION, seed=1, temperature=0, guidance_scale=3.0)
        started = pipeline.generate(CAPTION, temperature=0, guidance_scale=3.0, init_image=file.getvalue(), keep_rows=2)
    reference = text_logits(texts, CAPTION)
    expected = reference_picture(reference, family, size, CAPTION, 3.0)
    assert result.pictures[0].token_ids == expected
    assert result.images[0].size == (size.width, size.height)
    # after the given rows too, every token is the reference's for what stands before it
    tokens = started.pictures[0].token_ids
    given = family.encode_pixels(noise, size)[:2].flatten().tolist()
    assert tokens[: len(given)] == given
    cond = family.prompt_token_ids(CAPTION, size)
    uncond = family.unconditional_token_ids(cond, size)
    c, u = reference([*cond, *tokens])[len(cond) - 1 : -1], reference([*uncond, *tokens])[len(cond) - 1 : -1]
    assert tokens[len(given) :] == (u + 3.0 * (c - u)).argmax(1)[len(given) :].tolist()


def test_pictures_from_vllm_serve(texts: Path, tmp_path: Path) -> None:
    """Captions over HTTP: the vectors are made in the server's front end and go to the engine in another process."""
    family = family_of(texts)
    size = family.sizes[0]
    sjd = ["--speculative-model=[sjd]", "--num-speculative-tokens", "8"]
    limits = ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "4"]
    environment = {"VLLM_PLUGINS": "sjd_vllm"}
    with live_server(["vllm", "serve", str(texts), *sjd, *limits], tmp_path / "log", environment) as client:
        body = {"prompt": CAPTION, "temperature": 0, "guidance_scale": 3.0, "n": 2}
        answer = client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        refused = client.post("/v1/images/generations", json={**body, "negative_prompt": "a lake"})
        vectors = io.BytesIO()
        torch.save(torch.zeros(4, 128), vectors)
        encoded = base64.b64encode(vectors.getvalue()).decode()
        bare = client.post("/v1/completions", json={"model": str(texts), "prompt_embeds": encoded, "max_tokens": 4})
    expected = reference_picture(text_logits(texts, CAPTION), family, size, CAPTION, 3.0)
    pixels = family.decode_pixels([expected], size)[0]
    for picture in answer.json()["data"]:
        got = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))))
        assert np.abs(got.astype(int) - pixels.astype(int)).max() <= 1  # sums in another order
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "negative_prompt")
    assert bare.status_code == 400
    assert "prompt_embeds needs prompt_token_ids" in bare.text


@pytest.mark.parametrize("levels", [(1, 1, 2, 2, 4), (1, 2, 2, 4)], ids=["VQ-16", "VQ-8"])
def test_pixels_and_codes(tmp_path: Path, levels: tuple[int, ...]) -> None:
    tensors = vq_tensors(levels=levels)
    torch.save({"model": tensors}, tmp_path / "vq.pt")
    vq = LlamaGenVQ.from_file(tmp_path / "vq.pt")
    codes = torch.randint(0, NUM_CODES, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    expected = reference_pixels(tensors, codes)
    assert expected.shape == (3, 3, 4 * 2 ** (len(levels) - 1), 6 * 2 ** (len(levels) - 1))
    assert (vq.decode(codes) - expected).abs().max() < 1e-4 * expected.abs().max()
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(vq.encode(pixels), reference_codes(tensors, pixels))
    assert set(vq.state_dict()) | {"quantize.codebook_used"} == set(tensors)


def test_rows_and_batches_of_pixels(classes: Path) -> None:
    family = family_of(classes)
    size = family.sizes[0]
    codes = torch.arange(GRID * GRID).view(GRID, GRID) % NUM_CODES
    tokens = family.grammar(size).tokens(codes)
    whole = family.decode_pixels([tokens, tokens[::-1]], size)
    assert whole.shape == (2, 96, 96, 3)
    assert whole.dtype == np.uint8
    assert family.decode_pixels([tokens[: 2 * GRID]], size).shape == (1, 32, 96, 3)
    alone = family.decode_pixels([tokens], size)[0]
    assert np.abs(alone.astype(int) - whole[0].astype(int)).max() <= 1  # a sum in another order may round otherwise
    assert family.encode_pixels(whole[0], size).shape == (GRID, GRID)


def test_classes_by_number_and_name(tmp_path: Path) -> None:
    family = family_of(make_tiny_llamagen(tmp_path / "imagenet", num_classes=1000))
    size = family.sizes[0]
    assert family.prompt_token_ids(" 207 ", size) == [NUM_CODES + 207]
    # of sample_c2i.py: 207 and 979
    assert family.prompt_token_ids("Golden retriever", size) == [NUM_CODES + 207]
    assert family.prompt_token_ids("vale", size) == [NUM_CODES + 979]
    assert family.prompt_token_ids("toilet tissue, toilet paper, bathroom tissue", size) == [NUM_CODES + 999]
    assert family.unconditional_token_ids([NUM_CODES], size) == [NUM_CODES + 1000]
    assert family.negative_prompt_token_ids("otter", size) == [NUM_CODES + 360]
    for prompt, message in (
        ("1000", "from 0 to 999"),
        ("crane", "134, 517; give the number"),
        ("golden retreiver", "Did you mean 'golden retriever'"),
    ):
        with pytest.raises(ConfigError, match=message):
            family.prompt_token_ids(prompt, size)


def test_other_class_models_take_numbers_alone(classes: Path) -> None:
    family = family_of(classes)
    with pytest.raises(ConfigError, match=f"a number from 0 to {NUM_CLASSES - 1}; got 'goldfish'"):
        family.prompt_token_ids("goldfish", family.sizes[0])


def test_captions_refuse_what_they_cannot_honour(texts: Path) -> None:
    family = family_of(texts)
    request = ImageRequest(CAPTION, negative_prompt="a blue lake")
    with pytest.raises(ConfigError, match="negative_prompt"):
        request.pictures(family, family.shape.max_positions)
    with pytest.raises(ConfigError, match="4001 characters"):
        family.prompt_token_ids("a" * 4001, family.sizes[0])
    assert len(family.prompt_token_ids(" ".join(["a"] * 1000), family.sizes[0])) == CAPTION_ROWS


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        # what the authors' own `text_preprocessing` makes of them
        ("A blue Porsche 356 in front of a yellow brick wall.", "a blue porsche 356 in front of a yellow brick wall."),
        ("<person> in «Paris», this-is_my-cute_cat", 'person in "paris", this is my cute cat'),
        ("<b>Bold</b> &amp; free shipping 12x34 #AUS", "bold aus"),
    ],
)
def test_captions_are_cleaned(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


class TestBadFolders:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return make_tiny_llamagen(tmp_path / "c2i", wrapper=None)

    @staticmethod
    def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = torch.load(file)
        tensors = tensors.get("model", tensors)
        change(tensors)
        torch.save(tensors, file)

    def test_a_good_one_has_no_problems(self, path: Path, texts: Path, odd_heads: Path) -> None:
        for good in (path, texts, odd_heads):
            assert family_of(good).problems() == []

    def test_wrong_tensors_are_named(self, path: Path) -> None:
        file = path / "c2i_B_96.pt"
        self.rewrite(file, lambda t: t.update({"freqs_cis": torch.zeros(37, 32, 2)}))
        assert family_of(path).problems() == []
        self.rewrite(file, lambda t: t.pop("layers.1.ffn_norm.weight"))
        self.rewrite(file, lambda t: t.update({"layers.1.extra": torch.zeros(2), "norm.weight": torch.ones(3)}))
        self.rewrite(path / "vq_ds16_c2i.pt", lambda t: t.pop("decoder.mid.1.q.bias"))
        problems = "; ".join(family_of(path).problems())
        assert "c2i_B_96.pt: the tensor layers.1.ffn_norm.weight is missing" in problems
        assert "the tensor layers.1.extra is not known" in problems
        assert "the tensor norm.weight has the shape [3]; the config says [128]" in problems
        assert "vq_ds16_c2i.pt: the tensor decoder.mid.1.q.bias is missing" in problems
        with pytest.raises(ConfigError, match="cannot be used"):
            ImagePipeline(path)

    def test_what_is_missing_is_named_with_its_download(self, path: Path, texts: Path, tmp_path: Path) -> None:
        (path / "vq_ds16_c2i.pt").unlink()
        with pytest.raises(ConfigError, match=r"such as vq_ds16_c2i.pt of huggingface.co/FoundationVision/LlamaGen"):
            ImagePipeline(path)
        without = tmp_path / "without"
        without.mkdir()
        for file in texts.glob("*.pt"):
            (without / file.name).symlink_to(file)
        with pytest.raises(ConfigError, match=r"google/flan-t5-xl of huggingface.co, is looked for in .*without/flan"):
            ImagePipeline(without)

    def test_names_that_do_not_say_enough(self, path: Path) -> None:
        (path / "c2i_B_96.pt").rename(path / "c2i_B.pt")
        with pytest.raises(ConfigError, match="must end with the pixels of a picture's side"):
            ImagePipeline(path)
        (path / "c2i_B.pt").rename(path / "c2i_B_96.pt")
        (path / "c2i_L_96.pt").symlink_to(path / "c2i_B_96.pt")
        with pytest.raises(ConfigError, match=r"found c2i_B_96.pt, c2i_L_96.pt. Give each a folder of its own"):
            ImagePipeline(path)

    def test_a_size_that_it_does_not_have(self, path: Path) -> None:
        with pytest.raises(ValueError, match="size must be one of 96x96; got '64x64'"):
            family_of(path).size("64x64")
