"""Captions: the same for the same seed, short enough, and complete."""

import numpy as np
import pytest

from sjd_vllm.demo.captions import (
    ATTRIBUTES,
    Scene,
    captioned_scenes,
    captions,
    describe,
    random_scene,
    vocabulary,
)


def test_same_seed_same_captions() -> None:
    assert captions(50, seed=3) == captions(50, seed=3)
    assert captions(50, seed=3) != captions(50, seed=4)


def test_captions_are_short_and_use_known_words() -> None:
    known = set(vocabulary())
    for caption in captions(2000, seed=0):
        words = caption.replace(",", "").split()
        assert len(words) <= 32
        assert set(words) <= known


def test_every_word_occurs() -> None:
    said = {word for caption in captions(5000, seed=0) for word in caption.replace(",", "").split()}
    assert said == set(vocabulary())


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_caption_tells_the_values_of_an_attribute_apart(attribute: str) -> None:
    scene = Scene("night", "clouds", "left", "green", "lake", "red house", "right")
    captions_by_value = {
        value: {
            describe(Scene(**{**scene.__dict__, attribute: value}), np.random.default_rng(seed)) for seed in range(300)
        }
        for value in ATTRIBUTES[attribute]
    }
    values = list(captions_by_value)
    for i, one in enumerate(values):
        for other in values[i + 1 :]:
            assert not captions_by_value[one] & captions_by_value[other], (one, other)


def test_scenes_are_possible_and_cover_all_values() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(2000)]
    for scene in scenes:
        assert (scene.sky != "stars") or scene.time == "night"
        assert (scene.object != "boat") or scene.ground == "lake"
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)


def test_labels_and_scenes_are_inverse() -> None:
    for scene, _ in captioned_scenes(200, seed=1):
        if scene.object != "none":
            assert Scene.from_labels(scene.labels()) == scene
        else:
            assert scene.labels()[-1] == -1


def test_what_is_omitted_leaves_no_dangling_words() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        caption = describe(random_scene(rng), rng, omit_probability=0.6)
        for part in caption.split(", "):
            assert not part.endswith((" at", " behind", " under"))
            assert not part.startswith(("at ", "behind ", "under "))
