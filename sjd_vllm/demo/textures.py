"""Random fields with power-law spectra: the raw material of clouds, ridges, grass and ripples."""

from functools import cache

import numpy as np

PERIOD = 384  # pixels after which a field repeats; twice the width of a working picture
_FIELDS_PER_KIND = 32
_POOL_SEED = 12345

# kind -> (spectral exponent, x stretch, y stretch, lowest frequency kept). A larger exponent is smoother.
_KINDS = {
    "clouds": (2.1, 2.3, 1.0, 3),
    "grain": (1.35, 1.0, 1.0, 6),
    "ripples": (1.3, 4.0, 0.5, 6),
}


def crop(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """A random window, maybe mirrored, of a random field of this kind: float32 [size, size], mean 0, deviation 1."""
    pool = _pool(kind)
    field = pool[rng.integers(len(pool))]
    top, left = rng.integers(PERIOD - size, size=2)
    window = field[top : top + size, left : left + size]
    return window[:, ::-1] if rng.random() < 0.5 else window


def line(rng: np.random.Generator, exponent: float, min_frequency: int = 1) -> np.ndarray:
    """A periodic random line: float32 [PERIOD], mean 0, deviation 1."""
    frequency = np.arange(PERIOD // 2 + 1, dtype=np.float32)
    frequency[0] = 1
    amplitude = frequency**-exponent
    amplitude[:min_frequency] = 0
    spectrum = amplitude * (rng.standard_normal(frequency.size) + 1j * rng.standard_normal(frequency.size))
    values = np.fft.irfft(spectrum, PERIOD)
    return (values / values.std()).astype(np.float32)


@cache
def _pool(kind: str) -> np.ndarray:
    """All fields of a kind, float32 [fields, PERIOD, PERIOD]; drawn once, from a seed of their own."""
    exponent, stretch_x, stretch_y, min_frequency = _KINDS[kind]
    rng = np.random.default_rng([_POOL_SEED, list(_KINDS).index(kind)])
    frequency_y = np.fft.fftfreq(PERIOD)[:, None] * PERIOD * stretch_y
    frequency_x = np.fft.rfftfreq(PERIOD)[None] * PERIOD * stretch_x
    frequency = np.hypot(frequency_x, frequency_y)
    frequency[0, 0] = 1
    amplitude = frequency**-exponent
    amplitude[frequency < min_frequency] = 0
    amplitude[0, 0] = 0
    fields = np.empty((_FIELDS_PER_KIND, PERIOD, PERIOD), np.float32)
    for field in fields:
        noise = rng.standard_normal(amplitude.shape) + 1j * rng.standard_normal(amplitude.shape)
        values = np.fft.irfft2(amplitude * noise, s=field.shape)
        field[:] = (values - values.mean()) / values.std()
    return fields
