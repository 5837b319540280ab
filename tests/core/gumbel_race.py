"""What winners so far say about Gumbel noise over three columns, exactly.

argmax(log p + g) is an exponential race: column i arrives at t_i / p_i, with t_i independent and exponential,
and the first arrival wins. Divided by their sum, (t_1, t_2, t_3) are a uniform point of a triangle. Each
known winner cuts the triangle by straight lines, so what is known is a convex polygon, and the probability of
the next winner is a ratio of areas.
"""

from __future__ import annotations

Vertex = tuple[float, float, float]
Polygon = list[Vertex]
TRIANGLE: Polygon = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


def where_wins(polygon: Polygon, probs: list[float], column: int) -> Polygon:
    """The part of the polygon in which `column` wins under `probs`."""
    if probs[column] <= 0:
        return []
    for other in range(3):
        if other != column and probs[other] > 0:
            polygon = _clipped(polygon, column, other, probs)
    return polygon


def win_probs(polygon: Polygon, probs: list[float]) -> list[float]:
    """The probability of each column to win, given that the noise lies in the polygon."""
    areas = [_area(where_wins(polygon, probs, column)) for column in range(3)]
    return [area / sum(areas) for area in areas]


def key_of(polygon: Polygon) -> tuple[Vertex, ...]:
    """Equal for equal polygons, up to rounding."""
    return tuple(sorted({(round(a, 9), round(b, 9), round(c, 9)) for a, b, c in polygon}))


def _clipped(polygon: Polygon, column: int, other: int, probs: list[float]) -> Polygon:
    """The part with t_other / p_other >= t_column / p_column (Sutherland and Hodgman 1974)."""
    sides = [t[other] * probs[column] - t[column] * probs[other] for t in polygon]
    kept: Polygon = []
    for i, (vertex, side) in enumerate(zip(polygon, sides, strict=True)):
        before, before_side = polygon[i - 1], sides[i - 1]
        if (side >= 0) != (before_side >= 0):
            s = before_side / (before_side - side)
            a, b, c = (x + s * (y - x) for x, y in zip(before, vertex, strict=True))
            kept.append((a, b, c))
        if side >= 0:
            kept.append(vertex)
    return kept


def _area(polygon: Polygon) -> float:
    """Proportional to the area; the scale does not matter."""
    doubled = 0.0
    for i, b in enumerate(polygon):
        a = polygon[i - 1]
        doubled += a[0] * b[1] - a[1] * b[0]
    return abs(doubled)
