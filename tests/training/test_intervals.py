"""What a few seeds can tell: Student's t, alone and paired."""

import math
import random

import pytest

from train.intervals import STUDENT_T, gap, interval, student_t


def inside(quantile, freedom, steps=20_000):
    """How much of Student's t lies within ± quantile, by Simpson's rule."""
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(scale) / math.sqrt(freedom * math.pi)
    width = quantile / steps
    weights = [1, *[4, 2] * (steps // 2 - 1), 4, 1]
    values = ((1 + (n * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for n in range(steps + 1))
    return 2 * scale * width / 3 * sum(w * v for w, v in zip(weights, values, strict=True))


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 11, 20, 30])
def test_quantiles_hold_95_percent(freedom):
    assert inside(student_t(freedom), freedom) == pytest.approx(0.95, abs=1e-4)


def test_more_degrees_of_freedom_take_the_last_quantile():
    assert list(STUDENT_T) == sorted(STUDENT_T, reverse=True)
    assert student_t(31) == student_t(1000) == STUDENT_T[-1]


def test_interval_holds_the_mean_19_times_in_20():
    draw = random.Random(0)
    samples = [interval([draw.gauss(7, 2) for _ in range(3)]) for _ in range(4000)]
    held = sum(abs(mean - 7) <= margin for mean, margin in samples) / len(samples)
    assert held == pytest.approx(0.95, abs=0.01)


def test_equal_groups_differ_one_time_in_twenty():
    """Seeds that do much to both: a test that forgot to pair them would see next to nothing."""
    draw = random.Random(1)
    found = 0
    for _ in range(2000):
        seeds = {seed: draw.gauss(0, 5) for seed in range(4)}
        a, b = ({seed: x + draw.gauss(0, 1) for seed, x in seeds.items()} for _ in range(2))
        found += gap(a, b).clear
    assert found / 2000 == pytest.approx(0.05, abs=0.015)


def test_gap_of_seeds_that_are_not_shared_pools_the_variance():
    mean, margin, clear = gap({0: 1.0, 1: 3.0}, {5: 11.0, 6: 13.0})
    assert mean == 10.0
    assert margin == pytest.approx(student_t(2) * math.sqrt(2.0))
    assert clear


def test_one_value_has_no_interval_and_a_small_gap_is_none():
    assert interval([1.5]) == (1.5, None)
    assert gap({0: 1.0}, {0: 1.009}) == (pytest.approx(0.009), None, False)
    assert gap({0: 1.0}, {0: 1.011}).clear
