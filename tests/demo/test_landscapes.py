"""The renderer: seeded, and a change of an attribute shows where it should."""

from dataclasses import replace

import numpy as np

from sjd_vllm.demo.captions import Scene
from sjd_vllm.demo.landscapes import IMAGE_SIZE, render
from sjd_vllm.demo.pool import IndexStream, load_pool, render_pool

SCENE = Scene("day", "clear", "left", "snowy", "meadow", "red house", "right")


def draw(scene: Scene, seed: int = 0) -> np.ndarray:
    return render(scene, np.random.default_rng(seed)).astype(float)


def test_same_seed_same_picture() -> None:
    assert draw(SCENE).shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert np.array_equal(draw(SCENE), draw(SCENE))
    assert not np.array_equal(draw(SCENE), draw(SCENE, seed=1))


def test_night_is_darker_than_day() -> None:
    assert draw(replace(SCENE, time="night", sky="stars")).mean() < 0.5 * draw(SCENE).mean()


def test_the_sun_stands_where_the_scene_says() -> None:
    upper = draw(SCENE)[:, : IMAGE_SIZE // 3].sum(0)
    mirrored = draw(replace(SCENE, light_place="right"))[:, : IMAGE_SIZE // 3].sum(0)
    half = IMAGE_SIZE // 2
    assert upper[:, :half].mean() > upper[:, half:].mean()
    assert mirrored[:, :half].mean() < mirrored[:, half:].mean()


def test_a_red_house_adds_red_on_its_side() -> None:
    def redness(scene: Scene) -> np.ndarray:
        red, green, blue = draw(scene)
        return ((red > 120) & (green < 70) & (blue < 70)).sum(0)  # per column

    columns = redness(SCENE)
    assert columns[IMAGE_SIZE // 2 :].sum() > 100
    assert columns[: IMAGE_SIZE // 2].sum() == 0
    assert redness(replace(SCENE, object="blue house")).sum() == 0


def test_pool_is_kept_and_completed(tmp_path) -> None:
    render_pool(tmp_path, 3, seed=5, num_workers=1)
    images, labels = load_pool(tmp_path)
    assert images.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert labels.shape == (3, 7)
    written = (tmp_path / "chunk-0000.npz").stat().st_mtime_ns
    render_pool(tmp_path, 3, seed=5, num_workers=1)
    assert (tmp_path / "chunk-0000.npz").stat().st_mtime_ns == written


def test_index_stream_resumes_anywhere_and_covers_a_pass() -> None:
    whole = IndexStream(10, 3, seed=0)
    steps = [whole.at(step) for step in range(7)]
    assert np.array_equal(IndexStream(10, 3, seed=0).at(5), steps[5])
    assert len(set(np.concatenate(steps[:3]).tolist())) == 9
