"""Light and colours of the four times of day."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Daylight:
    """Colours (RGB, 0..255) and sizes (units) that depend on the time of day."""

    sky: tuple[tuple[int, int, int], ...]  # zenith, middle, horizon
    ambient: tuple[float, float, float]  # multiplies the colour of everything on the ground
    cloud_bright: tuple[int, int, int]
    cloud_dark: tuple[int, int, int]
    disc: tuple[int, int, int]
    disc_radius: float
    disc_height: tuple[float, float]  # range of distances from the top edge
    glow: tuple[int, int, int]
    glow_radius: float
    glow_strength: float
    water: tuple[int, int, int]


DAYLIGHT = {
    "day": Daylight(
        sky=((44, 106, 200), (112, 174, 234), (208, 230, 242)),
        ambient=(1.0, 1.0, 0.97),
        cloud_bright=(253, 253, 253),
        cloud_dark=(186, 198, 216),
        disc=(255, 252, 214),
        disc_radius=4.4,
        disc_height=(8, 12),
        glow=(255, 250, 225),
        glow_radius=7,
        glow_strength=0.75,
        water=(40, 100, 160),
    ),
    "sunset": Daylight(
        sky=((62, 44, 112), (208, 86, 92), (255, 182, 86)),
        ambient=(0.92, 0.62, 0.52),
        cloud_bright=(255, 152, 108),
        cloud_dark=(126, 58, 100),
        disc=(255, 234, 150),
        disc_radius=5.2,
        disc_height=(12, 17),
        glow=(255, 170, 70),
        glow_radius=11,
        glow_strength=0.85,
        water=(92, 48, 80),
    ),
    "night": Daylight(
        sky=((9, 12, 40), (20, 30, 78), (58, 78, 130)),
        ambient=(0.42, 0.50, 0.74),
        cloud_bright=(98, 108, 148),
        cloud_dark=(36, 44, 82),
        disc=(240, 240, 220),
        disc_radius=4.4,
        disc_height=(8, 12),
        glow=(110, 125, 170),
        glow_radius=5,
        glow_strength=0.55,
        water=(8, 14, 38),
    ),
    "dawn": Daylight(
        sky=((110, 140, 206), (228, 178, 206), (255, 228, 188)),
        ambient=(0.87, 0.78, 0.83),
        cloud_bright=(255, 230, 226),
        cloud_dark=(190, 154, 190),
        disc=(255, 246, 205),
        disc_radius=4.6,
        disc_height=(11, 16),
        glow=(255, 225, 170),
        glow_radius=9,
        glow_strength=0.75,
        water=(120, 130, 172),
    ),
}
