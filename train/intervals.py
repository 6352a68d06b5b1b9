"""What a few seeds can tell: a mean with its 95 % interval, and the gap between two groups.

Student's t distribution: with few seeds the spread itself is uncertain, and the interval is wide.
Groups that share their seeds share the order of the tokens too, so that seed is compared with
seed, and what a seed does to both falls out of the gap.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev, variance
from typing import NamedTuple

SMALLEST_GAP = 0.01
"""With one seed each, a smaller relative gap is never called a difference. One seed gives no
estimate of noise, and reruns of small models often differ by this much."""

STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Two-sided 95 % quantiles for 1, 2, ... degrees of freedom; the last also stands for more."""


class Interval(NamedTuple):
    """Where a mean is at 95 %: `mean` ± `margin`."""

    mean: float
    margin: float | None
    """None where one value says nothing about the noise."""


class Gap(NamedTuple):
    """How much larger the second of two groups is."""

    mean: float
    margin: float | None
    """Half the 95 % interval; None with one value each."""
    clear: bool
    """Whether it is more than the noise explains."""


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile; a little too wide beyond 30 degrees of freedom."""
    return STUDENT_T[min(freedom, len(STUDENT_T)) - 1]


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value, and how far the true one may be from it."""
    if len(values) < 2:
        return Interval(fmean(values), None)
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, None)
    return Interval(
        fmean(values), student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    )


def gap(a: Mapping[int, float], b: Mapping[int, float]) -> Gap:
    """`b` less `a`: paired where at least two seeds are shared, else by the pooled variance.

    Args:
        a: finite values by seed, at least one.
        b: likewise.
    """
    shared = sorted(a.keys() & b.keys())
    if len(shared) > 1:
        mean, margin = interval([b[seed] - a[seed] for seed in shared])
    else:
        first, second = list(a.values()), list(b.values())
        mean, margin = fmean(second) - fmean(first), _pooled_margin(first, second)
    if margin is None:
        smaller = min(abs(fmean(a.values())), abs(fmean(b.values())))
        return Gap(mean, None, abs(mean) > SMALLEST_GAP * smaller)
    return Gap(mean, margin, abs(mean) > margin)


def _pooled_margin(a: Sequence[float], b: Sequence[float]) -> float | None:
    freedom = len(a) + len(b) - 2
    if freedom == 0:
        return None
    squares = sum((len(x) - 1) * variance(x) for x in (a, b) if len(x) > 1)
    return student_t(freedom) * math.sqrt(squares / freedom * (1 / len(a) + 1 / len(b)))
