"""Pictures through a real engine, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sjd_vllm import ImagePipeline
from sjd_vllm.config import ConfigError

PROMPTS = ["a red house", "a blue lake at night", "lake", "house at night", "a red lake"]


def test_same_seed_same_picture_whatever_is_beside_it(pipeline: ImagePipeline) -> None:
    together = pipeline.generate(PROMPTS, n=2, seed=5).pictures
    for index, prompt in enumerate(PROMPTS):
        alone = pipeline.generate(prompt, seed=6).pictures[0]
        second = together[2 * index + 1]
        assert (second.request.prompt, second.request.seed) == (prompt, 6)
        assert second.token_ids == alone.token_ids
        assert np.array_equal(np.asarray(second.image), np.asarray(alone.image))


def test_plain_decoding_makes_the_same_pictures(pipeline: ImagePipeline) -> None:
    drafted, short, plain = (
        pipeline.generate(PROMPTS, seed=5, **settings).pictures
        for settings in ({}, {"num_speculative_tokens": 3}, {"method": "none"})
    )
    assert [p.token_ids for p in drafted] == [p.token_ids for p in plain] == [p.token_ids for p in short]
    assert all(picture.num_steps == picture.request.num_tokens for picture in plain)


def test_another_seed_gives_another_picture(pipeline: ImagePipeline) -> None:
    first, second = pipeline.generate("a red house", n=2, seed=5).pictures
    assert first.token_ids != second.token_ids


def test_a_seed_for_each_prompt(pipeline: ImagePipeline) -> None:
    pictures = pipeline.generate(PROMPTS[:2], seed=[3, 9]).pictures
    assert [picture.request.seed for picture in pictures] == [3, 9]
    with pytest.raises(ConfigError, match="1 for 2 prompts"):
        pipeline.generate(PROMPTS[:2], seed=[3])


def test_every_token_is_legal_and_pixels_follow(pipeline: ImagePipeline) -> None:
    result = pipeline.generate(PROMPTS, seed=1)
    size = pipeline.family.sizes[0]
    ranges = pipeline.family.grammar(size).legal_token_ranges()
    for picture in result.pictures:
        assert picture.image.size == (size.width, size.height)
        assert len(picture.token_ids) == len(ranges)
        for token_id, legal in zip(picture.token_ids, ranges, strict=True):
            assert any(first <= token_id < end for first, end in legal)
    assert result.images == [picture.image for picture in result.pictures]


def test_plain_decoding_takes_one_forward_a_token(pipeline: ImagePipeline) -> None:
    for settings in ({"method": "none"}, {"num_speculative_tokens": 0}):
        picture = pipeline.generate("a red house", seed=1, **settings).pictures[0]  # type: ignore[arg-type]
        assert picture.num_steps == len(picture.token_ids) == 43
        assert picture.step_compression == 1


def test_drafts_save_forwards(pipeline: ImagePipeline) -> None:
    result = pipeline.generate(PROMPTS, n=4, seed=1)
    assert result.num_tokens == 20 * 43
    assert 20 <= result.num_steps < result.num_tokens


def test_greedy_is_the_same_with_and_without_drafts(pipeline: ImagePipeline) -> None:
    plain = pipeline.generate(PROMPTS, temperature=0, method="none").pictures
    for redraft in ("coupled", "resample", "gumbel", "reuse"):
        drafted = pipeline.generate(PROMPTS, temperature=0, redraft=redraft).pictures
        assert [picture.token_ids for picture in drafted] == [picture.token_ids for picture in plain]


def test_guidance_changes_the_picture(pipeline: ImagePipeline) -> None:
    plain, guided = (
        pipeline.generate("a red house", temperature=0, guidance_scale=scale).pictures[0] for scale in (1, 4)
    )
    assert plain.token_ids != guided.token_ids


def test_progress_counts_rows_to_the_end(pipeline: ImagePipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline.generate(PROMPTS, seed=1, progress=lambda rows, total: seen.append((rows, total)))
    assert seen[-1] == (30, 30)
    assert seen == sorted(seen)
    assert len({rows for rows, _ in seen}) > 5


def test_an_interrupted_call_leaves_the_engine_usable(pipeline: ImagePipeline) -> None:
    def stop(rows: int, total: int) -> None:
        if rows > 3:
            raise KeyboardInterrupt

    before = pipeline.generate("a red house", seed=5).pictures[0]
    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(PROMPTS, n=3, seed=1, progress=stop)
    after = pipeline.generate("a red house", seed=5).pictures[0]
    assert after.token_ids == before.token_ids


def test_a_window_beyond_the_engines_is_refused(pipeline: ImagePipeline) -> None:
    with pytest.raises(ConfigError, match="from 0 to 8, the engine's own"):
        pipeline.generate("a red house", num_speculative_tokens=9)


def test_a_pipeline_can_be_closed_and_used_again(painter: Path, pipeline: ImagePipeline) -> None:
    expected = pipeline.generate("a red house", seed=5).pictures[0].token_ids
    pipeline.close()
    with ImagePipeline(painter, num_speculative_tokens=8, max_batch_size=1) as another:
        assert another.generate("a red house", seed=5).pictures[0].token_ids == expected
    assert pipeline.generate("a red house", seed=5).pictures[0].token_ids == expected
