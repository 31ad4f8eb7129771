"""How long a schedule takes, in closed form, and how many chunks are best by it (FinDEP, Eq. 13 and Theorem 4). Knows
durations; knows no models and no orders but the paper's two.

With X = t_a + t_s, Y = max(t_e, t_c), F = max(X, r2 Y), G = t_a + 2 t_c + t_e + (r2 - 1) Y:

    ASAS    (T - 1) max(G, r1 F) + max(X, G) + (r1 - 1) F                      exact where all chunks are alike
    AASS    (T - 1) max(G, r1 F) + max(r1 X, G + (r1 - 1) max(t_a, r2 Y))      exact in 98 of 100, else low

The paper prints (r2 - 1) Y once more in the first; the simulation says that it counts it twice.
"""

from __future__ import annotations

from collections.abc import Callable


def asas_s(layers: int, r1: int, r2: int, attention: float, shared: float, link: float, expert: float) -> float:
    """The closed form above."""
    x, _, f, g = _terms(r2, attention, shared, link, expert)
    return (layers - 1) * max(g, r1 * f) + max(x, g) + (r1 - 1) * f


def aass_s(layers: int, r1: int, r2: int, attention: float, shared: float, link: float, expert: float) -> float:
    """The closed form above."""
    x, y, f, g = _terms(r2, attention, shared, link, expert)
    return (layers - 1) * max(g, r1 * f) + max(r1 * x, g + (r1 - 1) * max(attention, r2 * y))


def printed_s(layers: int, r1: int, r2: int, attention: float, shared: float, link: float, expert: float) -> float:
    """The denominator of the paper's Eq. 13 as printed."""
    _, y, _, _ = _terms(r2, attention, shared, link, expert)
    return asas_s(layers, r1, r2, attention, shared, link, expert) + (r2 - 1) * y


def _terms(r2: int, attention: float, shared: float, link: float, expert: float) -> tuple[float, float, float, float]:
    x, y = attention + shared, max(expert, link)
    return x, y, max(x, r2 * y), attention + 2 * link + expert + (r2 - 1) * y


def best_r2(cost: Callable[[int], float], most: int) -> int:
    """The r2 of least cost, which is convex in 1 / r2 (the paper's Theorem 4): a ternary search, then the neighbours."""
    low, high = 1, most
    while high - low > 3:
        a, b = low + (high - low) // 3, high - (high - low) // 3
        if cost(a) <= cost(b):
            high = b
        else:
            low = a
    return min(range(max(1, low - 1), min(most, high + 1) + 1), key=lambda r2: (cost(r2), r2))
