"""Scenes of the demo model and the captions that describe them.

A scene is seven attributes. A caption says each of them once, in one of several phrasings and orders, in at most
32 words. This file knows nothing of pixels; `landscapes.py` draws a scene.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

PLACES = ("left", "center", "right")

# Attribute name -> its values, in the order of the class indices that the scorer predicts.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "time": ("day", "sunset", "night", "dawn"),
    "sky": ("clear", "clouds", "stars"),
    "light_place": PLACES,
    "mountains": ("none", "snowy", "green", "rocky"),
    "ground": ("meadow", "desert", "snow", "lake"),
    "object": ("none", "red house", "white house", "blue house", "pines", "boat"),
    "object_place": PLACES,
}

_MIRRORED_PLACE = {"left": "right", "center": "center", "right": "left"}

_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "time": {
        "day": ("day", "daytime", "noon"),
        "sunset": ("sunset", "dusk", "evening"),
        "night": ("night", "midnight"),
        "dawn": ("dawn", "sunrise", "early morning"),
    },
    "sky": {
        "clear": ("a clear sky", "a cloudless sky", "an empty sky"),
        "clouds": ("clouds", "a cloudy sky", "drifting clouds"),
        "stars": ("stars", "a starry sky", "many stars"),
    },
    "mountains": {
        "none": ("no mountains", "a flat horizon", "a distant horizon"),
        "snowy": ("snowy mountains", "snow capped mountains", "white peaks"),
        "green": ("green hills", "green mountains", "rolling hills"),
        "rocky": ("rocky mountains", "rocky peaks", "brown cliffs"),
    },
    "ground": {
        "meadow": ("a meadow", "a grassy meadow", "a green field"),
        "desert": ("a desert", "a sandy desert", "desert sand"),
        "snow": ("a snow field", "a snowy field", "deep snow"),
        "lake": ("a lake", "a calm lake", "still water"),
    },
    "object": {
        "red house": ("a red house", "a small red house", "a red cottage"),
        "white house": ("a white house", "a small white house", "a white cottage"),
        "blue house": ("a blue house", "a small blue house", "a blue cottage"),
        "pines": ("pine trees", "pines", "three pine trees"),
        "boat": ("a boat", "a sailing boat", "a sailboat"),
    },
}
_PLACE_PHRASES = {
    "left": ("on the left", "at left", "to the left"),
    "center": ("in the center", "in the middle", "at center"),
    "right": ("on the right", "at right", "to the right"),
}
_OPENINGS = ("", "", "a painting of ", "a landscape with ", "a picture of ")

# Each layout names the parts in the order in which they are said; a part without text falls out.
_LAYOUTS = (
    ("{object}", "{ground}", "{mountains}", "{sky}", "{light}", "{time}"),
    ("{object} at {time}", "{light}", "{sky}", "{mountains}", "{ground}"),
    ("{ground} at {time}", "{object}", "{mountains}", "{sky}", "{light}"),
    ("{mountains} behind {ground}", "{object}", "{time}", "{sky}", "{light}"),
    ("{ground} under {sky}", "{light}", "{mountains}", "{object}", "{time}"),
    ("{time}", "{sky}", "{light}", "{mountains}", "{ground}", "{object}"),
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Each field holds one of the values in `ATTRIBUTES`."""

    time: str
    sky: str
    light_place: str
    mountains: str
    ground: str
    object: str
    object_place: str

    def mirrored(self) -> "Scene":
        """The scene as seen in a mirror: left and right swapped."""
        return replace(
            self,
            light_place=_MIRRORED_PLACE[self.light_place],
            object_place=_MIRRORED_PLACE[self.object_place],
        )

    def labels(self) -> list[int]:
        """Class index of each attribute; -1 for the place of an object that is not there."""
        labels = [values.index(getattr(self, name)) for name, values in ATTRIBUTES.items()]
        if self.object == "none":
            labels[-1] = -1
        return labels

    @classmethod
    def from_labels(cls, labels: list[int]) -> "Scene":
        """Inverse of `labels`; a missing place reads as center."""
        return cls(*(values[max(label, 0)] for values, label in zip(ATTRIBUTES.values(), labels, strict=True)))


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: stars only at night, a boat only on a lake, no object in one picture of twelve."""
    time = _choose(rng, ATTRIBUTES["time"])
    ground = _choose(rng, ATTRIBUTES["ground"])
    objects = ATTRIBUTES["object"][1:] if ground == "lake" else ATTRIBUTES["object"][1:-1]
    return Scene(
        time=time,
        sky=_choose(rng, ("stars", "clouds") if time == "night" else ("clear", "clouds")),
        light_place=_choose(rng, PLACES),
        mountains=_choose(rng, ATTRIBUTES["mountains"]),
        ground=ground,
        object="none" if rng.random() < 1 / 12 else _choose(rng, objects),
        object_place=_choose(rng, PLACES),
    )


def describe(scene: Scene, rng: np.random.Generator, omit_probability: float = 0.0) -> str:
    """Say a scene in words.

    Args:
        scene: what to describe.
        rng: picks the phrasing.
        omit_probability: chance that each part is left unsaid (training uses it so that short prompts work).
    """
    said = {
        name: _choose(rng, phrases[getattr(scene, name)]) if getattr(scene, name) in phrases else ""
        for name, phrases in _PHRASES.items()
    }
    if said["object"]:
        said["object"] += " " + _choose(rng, _PLACE_PHRASES[scene.object_place])
    light = "moon" if scene.time == "night" else "sun"
    said["light"] = f"the {light} " + _choose(rng, _PLACE_PHRASES[scene.light_place])
    parts = {name: "" if rng.random() < omit_probability else text for name, text in said.items()}
    filled = (_fill(part, parts) for part in _choose(rng, _LAYOUTS))
    return _choose(rng, _OPENINGS) + ", ".join(text for text in filled if text)


def captions(num_captions: int, seed: int) -> list[str]:
    """Captions of random scenes, each naming every attribute; the same for the same seed."""
    return [caption for _, caption in captioned_scenes(num_captions, seed)]


def captioned_scenes(num_captions: int, seed: int) -> list[tuple[Scene, str]]:
    """Random scenes with their captions; the same for the same seed."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(num_captions)]
    return [(scene, describe(scene, rng)) for scene in scenes]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    texts = [*_all_phrases(), *_OPENINGS, *(re.sub(r"{\w+}", "", part) for layout in _LAYOUTS for part in layout)]
    return sorted({word for text in texts for word in text.split()})


def _all_phrases() -> Iterator[str]:
    for phrases in (*_PHRASES.values(), _PLACE_PHRASES):
        for alternatives in phrases.values():
            yield from alternatives
    yield from ("the sun", "the moon")


def _fill(part: str, said: dict[str, str]) -> str:
    """Put the words into one part of a layout; a linking word stays only between two things that are said."""
    names = re.findall(r"{(\w+)}", part)
    if all(said[name] for name in names):
        return part.format(**said)
    return ", ".join(said[name] for name in names if said[name])


def _choose(rng: np.random.Generator, values: tuple) -> str:
    return values[rng.integers(len(values))]
