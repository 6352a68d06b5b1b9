"""Where an axis has its ticks: round numbers, and never fewer than two."""

import math

MOST = 7
"""Ticks of a log axis: more would stand too close."""


def round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten: two to six of them."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= 0.999 * raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{n * step:.9g}") for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Decades between two positive numbers; more numbers, the closer the two are.

    `(1e-6, 1)` -> 1e-6, 1e-5, ... 1; `(0.002, 0.09)` -> 0.003, 0.01, 0.03; `(6, 9)` -> 6, 7, 8, 9.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        every = [float(f"{digit}e{n}") for n in decades for digit in digits]
        found = [tick for tick in every if low <= tick <= high]
        if len(found) > 2:
            return found[:: math.ceil(len(found) / MOST)]
    return round_ticks(low, high)
