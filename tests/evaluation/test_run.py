"""A run on a random checkpoint: every method, resumed after a crash, tested, laid out for the scorers, reported."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from sjd_vllm.core import martingale_sums, process_target
from sjd_vllm.evaluation.lossless import lossless_results
from sjd_vllm.evaluation.run_folder import RunFolder
from sjd_vllm.models.registry import load_family

LABELS = ["none", "gumbel", "coupled", "reuse@4", "reuse_biased"]
NUM_PROMPTS, NUM_EACH, NUM_TOKENS = 4, 6, 43


def test_every_method_has_every_picture_once(records: list[dict[str, Any]], finished: Path) -> None:
    assert Counter(record["method"] for record in records) == dict.fromkeys(LABELS, NUM_PROMPTS * NUM_EACH)
    assert len({(r["method"], r["prompt_index"], r["image_index"]) for r in records}) == len(records)
    for record in records:
        assert record["seed"] == record["prompt_index"] * NUM_EACH + record["image_index"]
        assert len(record["token_ids"]) == sum(record["tokens_per_step"]) == NUM_TOKENS
        with Image.open(finished / record["path"]) as picture:
            assert picture.size == (36, 36)
            assert picture.text["method"] == record["method"]  # type: ignore[attr-defined]


def test_methods_take_turns(records: list[dict[str, Any]]) -> None:
    """Eight pictures of each before the next eight, and another method goes first each time."""
    # the first 70 records were made by the first start
    turns = [records[start]["method"] for start in range(0, 70, 8)]
    assert turns[:5] == LABELS
    assert turns[5:9] == [*LABELS[1:], LABELS[0]][:4]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(records: list[dict[str, Any]], finished: Path) -> None:
    before = json.loads((finished / "before-the-crash.json").read_text())

    def tokens(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[int]]:
        return {(r["method"], r["prompt_index"], r["image_index"]): r["token_ids"] for r in rows}

    assert tokens(before) == tokens(records)


def test_other_settings_are_refused_and_named(
    evaluate: Callable[..., int], finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = str(Path(__file__).parent / "samples" / "evaluation_metadata.jsonl")
    assert evaluate("--suite", "geneval", samples, "--n", "5", "--methods", "none", "-o", str(finished)) == 2
    said = capfd.readouterr().err
    assert "images_per_prompt was 6" in said
    assert said.count("\n") == 1


def test_the_reference_is_the_model(finished: Path, records: list[dict[str, Any]], painter: Path) -> None:
    """The sums that stock vLLM's forward gave are those of Transformers."""
    family = load_family(painter)
    assert family is not None
    size = family.sizes[0]
    grammar = family.grammar(size)
    model = LlamaForCausalLM.from_pretrained(painter, dtype=torch.float32).eval()
    prompts = RunFolder.open(finished).prompts
    sums = {}
    for line in (finished / "lossless.jsonl").read_text().splitlines():
        label, prompt, image, values = json.loads(line)
        sums[label, prompt, image] = values
    assert len(sums) == len(records)
    for record in records[::9]:
        tokens = record["token_ids"]
        starts = [
            family.prompt_token_ids(prompts[record["prompt_index"]].text, size),
            family.negative_prompt_token_ids(None, size),
        ]
        with torch.inference_mode():
            cond, uncond = (
                model(torch.tensor([[*start, *tokens[:-1]]])).logits[:, len(start) - 1 :, grammar.token_ids]
                for start in starts
            )
        legal = grammar.legal_sets[grammar.set_of_position][None]
        probs = process_target(cond, uncond_logits=uncond, guidance_scale=torch.tensor([2.0]), legal=legal)[0]
        free = legal[0].sum(1) > 1
        columns = torch.searchsorted(grammar.token_ids, torch.tensor(tokens))
        expected = martingale_sums(probs[free], columns[free])
        found = sums[record["method"], record["prompt_index"], record["image_index"]]
        assert found.pop("outside")[2] == 0
        assert found.keys() == expected.keys()
        for name, (excess, variance, num_tokens) in found.items():
            assert excess == pytest.approx(expected[name].excess, abs=1e-3)
            assert variance == pytest.approx(expected[name].variance, rel=1e-3)
            assert num_tokens == expected[name].num_tokens == 36


def test_sums_that_a_crash_tore_are_left_out(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "lossless.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:50]) + lines[50][:20])
    results = lossless_results(RunFolder.open(tmp_path / "run"))
    assert sum(method["num_pictures"] for method in results["methods"].values()) == 50
    assert file.read_text() == "".join(lines[:50])


def test_the_law_is_kept_and_the_control_is_not(finished: Path) -> None:
    results = json.loads((finished / "lossless.json").read_text())
    assert 4 < results["limit"] < 5
    for label in LABELS[:-1]:
        method = results["methods"][label]
        assert method["is_exact"]
        assert method["num_pictures"] == NUM_PROMPTS * NUM_EACH
        assert all(abs(value["z"]) < results["limit"] for value in method["statistics"].values()), method
        assert all(0 < value["visible_bias"] < 0.5 for value in method["statistics"].values())
    biased = results["methods"]["reuse_biased"]
    assert not biased["is_exact"]
    assert results["methods"]["gumbel"]["identical"] == {"pictures": 24, "of": 24}
    assert results["methods"]["coupled"]["identical"]["pictures"] < 24


def test_two_sample_tests_know_the_same_pictures(finished: Path) -> None:
    results = json.loads((finished / "two_sample.json").read_text())
    assert results["against"] == "none"
    assert set(results["methods"]) == set(LABELS[1:])
    assert all(value["p"] == 1 for value in results["methods"]["gumbel"]["statistics"].values())
    for label in ("coupled", "reuse@4"):
        assert all(value["p"] > 1e-3 for value in results["methods"][label]["statistics"].values())


def test_genevals_scorer_finds_what_it_looks_for(finished: Path, records: list[dict[str, Any]]) -> None:
    """The walk of its evaluate_images.py: folders of digits, metadata.jsonl, samples/NNNN.png."""
    lines = (Path(__file__).parent / "samples" / "evaluation_metadata.jsonl").read_text().splitlines()
    for label in LABELS:
        folders = sorted((finished / "for-scorers" / label).iterdir())
        assert [folder.name for folder in folders] == [f"{index:05d}" for index in range(NUM_PROMPTS)]
        for index, folder in enumerate(folders):
            assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(lines[index])
            assert [path.name for path in sorted((folder / "samples").iterdir())] == [
                f"{image:04d}.png" for image in range(NUM_EACH)
            ]
    one = next(r for r in records if (r["method"], r["prompt_index"], r["image_index"]) == ("coupled", 2, 3))
    laid = finished / "for-scorers" / "coupled" / "00002" / "samples" / "0003.png"
    assert laid.read_bytes() == (finished / one["path"]).read_bytes()
