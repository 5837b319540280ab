"""Draws a scene: numpy only, seeded, about 5 ms a picture.

Everything is laid out in units of 1/64 of the picture's side and painted back to front on a canvas of twice the
final resolution, which is averaged down at the end. Arrays are float32 [3, SIZE, SIZE] in 0..255 until then.
"""

import numpy as np
from numpy.typing import ArrayLike

from sjd_vllm.demo import textures
from sjd_vllm.demo.captions import Scene
from sjd_vllm.demo.daylight import DAYLIGHT, Daylight
from sjd_vllm.demo.objects import Brush, draw_object

Array = np.ndarray

IMAGE_SIZE = 96
UNITS = 64  # side of the picture in layout units
SIZE = 2 * IMAGE_SIZE  # side of the working canvas in pixels
SCALE = SIZE // UNITS  # canvas pixels per unit

_ROWS, _COLUMNS = (np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5) / SCALE
_PLACE_X = {"left": 13.0, "center": 32.0, "right": 51.0}


def render(scene: Scene, rng: np.random.Generator) -> Array:
    """Draw one picture of a scene.

    Args:
        scene: what to show.
        rng: decides all that the scene leaves open; the same generator state gives the same picture.

    Returns:
        uint8 [3, 96, 96].
    """
    light = DAYLIGHT[scene.time]
    horizon = rng.uniform(38.5, 41.5)
    sky_colours = [np.array(colour, np.float32) + rng.normal(0, 5, 3).astype(np.float32) for colour in light.sky]
    ambient = (np.array(light.ambient) * rng.uniform(0.95, 1.05)).astype(np.float32)
    light_x = _PLACE_X[scene.light_place] + rng.normal(0, 1.7)

    canvas = _sky(scene, light, light_x, sky_colours, horizon, rng)
    _mountains(canvas, scene, light_x, sky_colours[2], ambient, horizon, rng)
    brush = Brush(canvas, SCALE, ambient, lit_windows=scene.time == "night")
    object_x = _PLACE_X[scene.object_place] + rng.normal(0, 1.5)
    if scene.ground == "lake":
        _lake_shore(canvas, ambient, horizon, rng)
        if scene.object != "boat":
            draw_object(brush, scene, object_x, horizon - 0.2, 1.05, rng)
        _lake(canvas, light, light_x, horizon, rng)
        if scene.object == "boat":
            draw_object(brush, scene, object_x, rng.uniform(50, 54), 1.15, rng)
    else:
        _land(canvas, scene, sky_colours[2], ambient, horizon, rng)
        draw_object(brush, scene, object_x, rng.uniform(horizon + 9, horizon + 12.5), 1.25, rng)
    small = canvas.reshape(3, IMAGE_SIZE, 2, IMAGE_SIZE, 2).mean((2, 4))
    return np.clip(small + 0.5, 0, 255).astype(np.uint8)


def _sky(
    scene: Scene, light: Daylight, light_x: float, colours: list[Array], horizon: float, rng: np.random.Generator
) -> Array:
    """Gradient, glow, then stars or clouds, then the disc of the sun or moon in front of them."""
    zenith, middle, low = (_column(colour) for colour in colours)
    height = np.clip(_ROWS[:, :1] / horizon, 0, 1)[None]
    knee = rng.uniform(0.45, 0.62)
    gradient = np.where(
        height < knee,
        _mix(zenith, middle, _smooth(height / knee)),
        _mix(middle, low, _smooth((height - knee) / (1 - knee))),
    )
    canvas = np.repeat(gradient.astype(np.float32), SIZE, 2)

    radius = light.disc_radius * rng.uniform(0.95, 1.06)
    distance = np.hypot(_COLUMNS - light_x, _ROWS - rng.uniform(*light.disc_height))
    glow = np.exp(-np.maximum(distance - radius, 0) / light.glow_radius) * light.glow_strength
    canvas = _mix(canvas, _column(light.glow), glow)
    if scene.sky == "stars":
        _stars(canvas, distance > radius + 3, horizon, rng)
    elif scene.sky == "clouds":
        canvas = _clouds(canvas, light, glow, horizon, rng)

    face = _column(light.disc)
    if scene.time == "night":
        face = face * (1 - 0.13 * _smooth(textures.crop(rng, "grain", SIZE) * 0.8 - 0.1))
    return _mix(canvas, face, _inside(radius - distance))


def _stars(canvas: Array, is_free: Array, horizon: float, rng: np.random.Generator) -> None:
    """Small squares of light, larger than a pixel so that they survive the autoencoder."""
    for _ in range(rng.integers(34, 46)):
        row = rng.integers(2, int((horizon - 6) * SCALE))
        column = rng.integers(2, SIZE - 6)
        side = 4 if rng.random() < 0.4 else 3
        if is_free[row, column]:
            canvas[:, row : row + side, column : column + side] += rng.uniform(90, 215)


def _clouds(canvas: Array, light: Daylight, glow: Array, horizon: float, rng: np.random.Generator) -> Array:
    margin = 8  # pixels by which the field is shifted against itself to find the lit side
    wide_field = textures.crop(rng, "clouds", SIZE + 2 * margin)
    field = wide_field[margin:-margin, margin:-margin]
    lit_from_above = wide_field[2 * margin :, margin // 2 : SIZE + margin // 2]
    band = _smooth(1 - np.abs(_ROWS / horizon - 0.42) * 2.4)
    cover = _smooth((field - 0.05 + 0.38 * band) * 1.2 - 0.05) * _smooth((horizon - _ROWS) / 9) * 0.94
    bright = _mix(_column(light.cloud_bright), _column(light.glow), 0.5 * glow)
    colour = _mix(_column(light.cloud_dark), bright, _smooth(0.5 + (field - lit_from_above) * 0.9))
    return _mix(canvas, colour, cover)


def _mountains(
    canvas: Array,
    scene: Scene,
    light_x: float,
    haze_colour: Array,
    ambient: Array,
    horizon: float,
    rng: np.random.Generator,
) -> None:
    """Ridges from far to near: (kind, relief, height of the mean ridge, haze)."""
    ridges = {
        "none": [("dunes", 1.2, 1.0, 0.45) if scene.ground == "desert" else ("woods", 1.0, 1.4, 0.6)],
        "snowy": [("snowy", 6.2, 18.0, 0.28), ("woods", 1.6, 4.0, 0.25)],
        "green": [("green", 3.4, 12.0, 0.40), ("green", 2.6, 6.0, 0.12)],
        "rocky": [("rocky", 5.8, 15.5, 0.28), ("rocky", 3.2, 6.5, 0.08)],
    }[scene.mountains]
    offset = light_x - UNITS / 2
    lit_side = np.sign(offset) if abs(offset) > 8 else rng.choice((-1.0, 1.0))
    for kind, relief, height, haze in ridges:
        _ridge(canvas, kind, relief, horizon - height, haze, lit_side, haze_colour, ambient, rng)


def _ridge(
    canvas: Array,
    kind: str,
    relief: float,
    base: float,
    haze: float,
    lit_side: float,
    haze_colour: Array,
    ambient: Array,
    rng: np.random.Generator,
) -> None:
    if kind in ("snowy", "rocky"):  # folding a random line at zero gives pointed peaks
        profile = 0.8 - 1.3 * np.abs(textures.line(rng, 1.75, 2)) + 0.12 * textures.line(rng, 0.9, 12)
    else:
        profile = textures.line(rng, 2.2, 2)
    profile = np.clip(np.roll(profile, rng.integers(textures.PERIOD))[:SIZE], -2.0, 1.45)
    ridge_y = base - relief * profile
    top = max(0, int(SCALE * ridge_y.min()) - 2)
    depth = _ROWS[top:] - ridge_y  # how far below the ridge, in units
    grain = textures.crop(rng, "grain", SIZE)[top:]
    fold = _folds(depth, lit_side, rng)
    if kind == "snowy":
        snow = _smooth((8.5 - depth + 3.2 * fold + 1.5 * grain) * 0.28)
        colour = _mix(_column((96, 102, 122)), _column((246, 249, 255)), snow)
        colour = colour * np.clip(0.86 + 0.17 * fold, 0.5, 1.08)
    elif kind == "rocky":
        colour = _column((152, 112, 84)) * np.clip(0.82 + 0.22 * fold + 0.08 * grain, 0.35, 1.25)
    elif kind == "green":
        colour = _mix(_column((70, 132, 62)), _column((122, 166, 72)), _smooth(0.5 + 0.3 * fold))
        colour = colour * np.clip(0.92 + 0.08 * grain - 0.012 * depth, 0.5, 1.2)
    elif kind == "woods":
        colour = _column((60, 92, 76)) * np.clip(0.9 + 0.1 * grain, 0.6, 1.2)
    else:
        colour = _column((214, 180, 120)) * np.ones_like(depth)
    veil = haze * (0.7 + 0.5 * _smooth((_ROWS[top:] - base) / 14))
    colour = _mix(colour * ambient[:, None, None], _column(haze_colour) * 0.93, veil)
    canvas[:, top:] = _mix(canvas[:, top:], colour, _inside(depth))


def _folds(depth: Array, lit_side: float, rng: np.random.Generator) -> Array:
    """Spurs running down a slope: one random line, sheared one way and, steeper, the other way."""
    spurs = textures.line(rng, 1.15, 3)
    columns = np.arange(SIZE)
    shear = (depth * SCALE).astype(int)
    towards = (columns + (0.55 * shear * lit_side).astype(int)) % textures.PERIOD
    away = (columns - (1.1 * shear * lit_side).astype(int) + 130) % textures.PERIOD
    return spurs[towards] * 0.6 + spurs[away] * 0.45


def _lake_shore(canvas: Array, ambient: Array, horizon: float, rng: np.random.Generator) -> None:
    shore = horizon - rng.uniform(1.2, 1.8) + 0.35 * textures.line(rng, 1.6, 2)[:SIZE]
    mask = _inside(_ROWS - shore) * _inside(horizon + 1 - _ROWS)
    grass = _column((72, 106, 56)) * ambient[:, None, None]
    canvas[:] = _mix(canvas, grass * np.clip(0.9 + 0.15 * textures.crop(rng, "grain", SIZE), 0.5, 1.2), mask)


def _lake(canvas: Array, light: Daylight, light_x: float, horizon: float, rng: np.random.Generator) -> None:
    """Mirror what lies above the horizon, shaken by ripples that grow towards the viewer, with a path of light."""
    first = round(SCALE * horizon)
    num_rows = SIZE - first
    ripples = textures.crop(rng, "ripples", SIZE)[:num_rows]
    distance = np.arange(num_rows, dtype=np.float32)[:, None]
    source_y = np.clip(first - 1 - (distance + ripples * (0.7 + 0.075 * distance)).astype(int), 0, first - 1)
    source_x = np.clip(np.arange(SIZE) + (ripples * (0.9 + 0.03 * distance)).astype(int), 0, SIZE - 1)
    tint = 0.18 + 0.3 * _smooth(distance / num_rows)
    water = _mix(canvas[:, source_y, source_x] * 0.82, _column(light.water), tint)
    water = water * (1 + 0.06 * ripples * _smooth(distance / 30 + 0.2))
    across = (_COLUMNS[first:] - light_x) / (2.2 + 0.035 * distance)
    path = np.exp(-(across**2)) * _smooth(0.55 + 0.5 * ripples) * 0.6 * light.glow_strength
    canvas[:, first:] = _mix(water, _column(light.disc), path)


def _land(
    canvas: Array, scene: Scene, haze_colour: Array, ambient: Array, horizon: float, rng: np.random.Generator
) -> None:
    """Meadow, desert or snow, hazy at the far edge; a meadow gets flowers of one colour."""
    swell = {"meadow": 0.7, "desert": 1.3, "snow": 1.0}[scene.ground]
    edge = horizon + swell * textures.line(rng, 2.0, 1)[:SIZE]
    top = int(SCALE * edge.min()) - 2
    rows = _ROWS[top:]
    nearness = np.clip((rows - horizon) / (UNITS - horizon), 0, 1)
    grain, ripples = (textures.crop(rng, kind, SIZE)[top:] for kind in ("grain", "ripples"))
    if scene.ground == "meadow":
        colour = _mix(_column((144, 182, 78)), _column((60, 118, 42)), nearness)
        colour = colour * (1 + (0.04 + 0.07 * nearness) * grain + 0.06 * ripples)
    elif scene.ground == "desert":
        colour = _mix(_column((242, 214, 152)), _column((208, 158, 92)), nearness) * (1 + 0.08 * ripples + 0.02 * grain)
    else:
        drift = nearness * 0.7 + 0.3 * _smooth(0.5 + 0.4 * ripples)
        colour = _mix(_column((247, 249, 254)), _column((206, 219, 242)), drift) * (1 + 0.015 * grain)
    colour = colour * ambient[:, None, None]
    colour = _mix(colour, _column(haze_colour), 0.22 * _smooth(1 - nearness * 2.2))
    canvas[:, top:] = _mix(canvas[:, top:], colour, _inside(rows - edge))
    if scene.ground == "meadow":
        petal = np.array([(250, 220, 90), (250, 250, 245), (235, 110, 120)], np.float32)[rng.integers(3)] * ambient
        for _ in range(rng.integers(10, 20)):
            row, column = rng.integers(int(SCALE * (horizon + 6)), SIZE - 4), rng.integers(0, SIZE - 4)
            spot = canvas[:, row : row + 4, column : column + 4]
            spot[:] = _mix(spot, _column(petal), 0.8)


def _column(colour: ArrayLike) -> Array:
    """RGB as [3, 1, 1], to be broadcast over a picture."""
    return np.asarray(colour, np.float32)[:, None, None]


def _mix(a: Array, b: Array, amount: Array | float) -> Array:
    """`a` where `amount` is 0, `b` where it is 1."""
    return a + (b - a) * amount


def _smooth(x: ArrayLike) -> Array:
    """Smoothstep: 0 below 0, 1 above 1, no kinks."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _inside(distance: Array) -> Array:
    """Coverage of a pixel that lies `distance` units inside an edge."""
    return np.clip(distance * SCALE + 0.5, 0, 1)
