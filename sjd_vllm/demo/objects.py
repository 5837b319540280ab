"""The things that stand in a landscape: houses, pines and a sailing boat, painted with soft-edged masks."""

from dataclasses import dataclass

import numpy as np

from sjd_vllm.demo.captions import Scene

_WALLS = {"red house": (208, 38, 32), "white house": (246, 243, 236), "blue house": (46, 92, 212)}
_ROOFS = {"red house": (84, 62, 62), "white house": (164, 68, 48), "blue house": (66, 68, 86)}


@dataclass(frozen=True)
class Brush:
    """What every object needs to be painted.

    Attributes:
        canvas: float32 [3, S, S], painted in place.
        scale: canvas pixels per layout unit.
        ambient: float32 [3], multiplies colours.
        lit_windows: whether windows glow.
    """

    canvas: np.ndarray
    scale: int
    ambient: np.ndarray
    lit_windows: bool

    def patch(self, x: float, y: float, half_width: float, above: float, below: float) -> "Patch":
        """The part of the canvas around the foot (x, y) of an object, in units."""
        size = self.canvas.shape[1]
        x0, x1 = (int(np.clip(self.scale * edge, 0, size)) for edge in (x - half_width, x + half_width))
        y0, y1 = (int(np.clip(self.scale * edge, 0, size)) for edge in (y - above, y + below))
        columns = (np.arange(x0, x1, dtype=np.float32) + 0.5) / self.scale - x
        rows = (np.arange(y0, y1, dtype=np.float32) + 0.5) / self.scale - y
        return Patch(self.canvas[:, y0:y1, x0:x1], columns[None], rows[:, None], self.scale)

    def shade(self, colour: tuple[int, int, int], brightness: float | np.ndarray = 1.0) -> np.ndarray:
        """A colour under the ambient light, slightly brighter than the ground: float32 [3, 1, 1] or [3, h, w]."""
        ambient = self.ambient + (1 - self.ambient) * 0.12
        return np.asarray(colour, np.float32)[:, None, None] * ambient[:, None, None] * brightness


@dataclass(frozen=True)
class Patch:
    """A window on the canvas with coordinates relative to an object's foot; y grows downwards."""

    pixels: np.ndarray  # float32 [3, h, w], a view
    x: np.ndarray  # [1, w], units
    y: np.ndarray  # [h, 1], units
    scale: int

    def paint(self, inside: np.ndarray, colour: np.ndarray, opacity: float | np.ndarray = 1.0) -> None:
        """Paint where `inside`, the signed distance from the shape's edge in units [h, w], is positive."""
        mask = np.clip(inside * self.scale + 0.5, 0, 1) * opacity
        self.pixels[:] += (colour - self.pixels) * mask

    def box(self, x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
        """Signed distance of a rectangle centred at (x, y)."""
        return np.minimum(half_width - np.abs(self.x - x), half_height - np.abs(self.y - y))


def draw_object(brush: Brush, scene: Scene, x: float, y: float, size: float, rng: np.random.Generator) -> None:
    """Paint the scene's object, if any, with its foot at (x, y) units and its size as a factor."""
    if scene.object in _WALLS:
        _house(brush, scene.object, x, y, size, rng)
    elif scene.object == "pines":
        _pines(brush, x, y, size, scene.ground == "snow", rng)
    elif scene.object == "boat":
        _boat(brush, x, y, size, rng)


def _house(brush: Brush, kind: str, x: float, y: float, size: float, rng: np.random.Generator) -> None:
    half_width, wall, roof = (size * rng.uniform(*span) for span in ((6.4, 7.2), (7.4, 8.4), (5.2, 6.2)))
    side = rng.choice((-1.0, 1.0))  # which way the house faces
    patch = brush.patch(x, y, half_width + 4, wall + roof + 4, 2)
    patch.paint(patch.box(0, 0.3, half_width + 0.6, 0.6), brush.shade((20, 22, 25)), 0.4)
    patch.paint(
        patch.box(-side * 0.45 * half_width, -wall - 0.5 * roof - 0.6, 1.2 * size, 0.5 * roof + 0.8),
        brush.shade((124, 70, 58)),
    )
    light_on_wall = 0.93 + 0.12 * side * np.clip(patch.x / half_width, -1, 1)
    patch.paint(patch.box(0, -wall / 2, half_width, wall / 2), brush.shade(_WALLS[kind], light_on_wall))
    slope = (patch.y + wall + roof) / roof  # 0 at the ridge, 1 at the eaves
    eaves = half_width * (0.42 + 0.58 * slope) + 1.4 * slope - np.abs(patch.x)
    patch.paint(
        np.minimum(eaves, np.minimum(slope, 1.06 - slope) * roof), brush.shade(_ROOFS[kind], 1.12 - 0.22 * slope)
    )
    window = np.array((255, 214, 110), np.float32)[:, None, None] if brush.lit_windows else brush.shade((58, 70, 92))
    patch.paint(patch.box(side * half_width * 0.5, -wall * 0.55, 1.7 * size, 1.6 * size), window)
    patch.paint(patch.box(-side * half_width * 0.42, -wall * 0.31, 1.5 * size, wall * 0.31), brush.shade((74, 48, 34)))


def _pines(brush: Brush, x: float, y: float, size: float, is_snowy: bool, rng: np.random.Generator) -> None:
    """Three trees of three tiers each, the tallest in front."""
    for offset, shortest, tallest, forward in ((-6.5, 13, 16, 0.0), (6.0, 12, 15, 0.0), (0.0, 17, 20, 1.2)):
        height = size * rng.uniform(shortest, tallest)
        spread = 0.31 * height
        patch = brush.patch(x + size * (offset + rng.normal(0, 0.6)), y + forward, spread + 2, height + 1, 2)
        patch.paint(patch.box(0, 0, 0.7 * spread, 0.6), brush.shade((15, 20, 20)), 0.35)
        patch.paint(patch.box(0, -0.1 * height, 1.0 * size, 0.1 * height), brush.shade((86, 58, 40)))
        depth = (patch.y + height) / (0.88 * height)  # 0 at the tip, 1 at the lowest twigs
        tier = np.floor(3 * depth)
        within = 3 * depth - tier
        half_width = spread * (0.25 * tier + 0.12 + 0.42 * within)
        inside = np.minimum(half_width - np.abs(patch.x), np.minimum(depth, 1 - depth) * height)
        brightness = 0.84 + 0.3 * np.clip(patch.x / spread, -1, 1) + 0.22 * within
        patch.paint(inside, brush.shade((32, 94, 50), brightness))
        if is_snowy:
            patch.paint(inside, brush.shade((236, 241, 250)), 0.75 * np.clip((0.42 - within) * 4, 0, 1))


def _boat(brush: Brush, x: float, y: float, size: float, rng: np.random.Generator) -> None:
    """Hull, mast and two sails, and the same once more upside down in the water."""
    side = rng.choice((-1.0, 1.0))
    half_width, height = 7.6 * size, 14.5 * size
    below = brush.patch(x, y, half_width + 1, 0, height)
    mirrored = Patch(below.pixels, below.x + 0.5 * np.sin(2.6 * below.y), -1.1 * below.y, below.scale)
    above = brush.patch(x, y, half_width + 1, height + 1, 1)
    for patch, opacity in ((mirrored, 0.4), (above, 1.0)):
        across = patch.x * side
        hull = np.minimum(
            np.minimum(-patch.y, patch.y + 3.3 * size), half_width * (0.62 - 0.11 * patch.y / size) - np.abs(across)
        )
        patch.paint(hull, brush.shade((150, 58, 34), 1 + 0.06 * patch.y), opacity)
        patch.paint(
            np.minimum(0.5 - np.abs(across), np.minimum(-3 * size - patch.y, patch.y + height)),
            brush.shade((70, 50, 40)),
            opacity,
        )
        drop = (patch.y + height) / (height - 4.2 * size)  # 0 at the masthead, 1 at the boom
        main_sail = np.minimum(across - 0.6, 0.6 + 5.8 * size * drop - across)
        jib = np.minimum(-0.6 - across, across + 0.6 + 4.0 * size * (drop - 0.25) / 0.75)
        boom = (1 - drop) * height
        patch.paint(np.minimum(main_sail, boom), brush.shade((252, 248, 238)), opacity)
        patch.paint(np.minimum(jib, boom), brush.shade((226, 214, 198)), opacity)
