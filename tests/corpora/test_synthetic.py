"""The tasks: every answer is found again by a slow solver that reads one row as a person would."""

from functools import partial
from itertools import permutations

import pytest
import torch

from data import synthetic
from data.errors import DataError

ROWS = 40


def solve_recall(row):
    pairs = len(row) // 6
    known = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
    return {n: known[row[n]] for n in range(2 * pairs, len(row)) if row[n] != 0}


def solve_copying(row):
    sign = row.index(0)
    return {sign + n: symbol for n, symbol in enumerate(row[:sign])}


def solve_induction(row):
    assert row.count(0) == 2
    return {len(row) - 1: row[row.index(0) + 1]}


def solve_parity(row):
    return {place: sum(row[: place + 1]) % 2 for place in range(len(row))}


def solve_permutations(size):
    group = list(permutations(range(size)))

    def solve(row):
        things, found = list(range(size)), {}
        for place, number in enumerate(row):
            things = [group[number][thing] for thing in things]
            found[place] = group.index(tuple(things))
        return found

    return solve


def solve_needle(row):
    (value,) = (token for token in row if token > 15)
    assert row[-1] == 0
    return {len(row) - 1: value}


CASES = {
    "recall": (synthetic.recall, {"num_pairs": 7, "vocab_size": 33}, solve_recall, 42),
    "copying": (synthetic.copying, {"length": 9}, solve_copying, 18),
    "induction": (synthetic.induction, {"length": 20}, solve_induction, 20),
    "parity": (synthetic.parity, {"length": 25}, solve_parity, 25),
    "s3": (synthetic.permutations, {"size": 3, "length": 25}, solve_permutations(3), 25),
    "s5": (synthetic.permutations, {"size": 5, "length": 25}, solve_permutations(5), 25),
    "needle": (synthetic.needle, {"distance": 13}, solve_needle, 8 + 13 + 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_slow_solver_finds_every_answer(name):
    make, settings, solve, length = CASES[name]
    batch = make(ROWS, **settings, seed=3, step=4)
    assert batch.inputs.shape == batch.targets.shape == batch.counted.shape == (ROWS, length)
    assert (batch.targets[~batch.counted] == 0).all()
    for row, targets, counted in zip(*(x.tolist() for x in batch), strict=True):
        found = {n: target for n, target in enumerate(targets) if counted[n]}
        assert found
        assert found == solve(row)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_decided_by_its_arguments(name):
    make, settings, _, _ = CASES[name]
    torch.manual_seed(0)
    first = make(ROWS, **settings, seed=3, step=4)
    torch.manual_seed(1)
    again = make(ROWS, **settings, seed=3, step=4)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for other in ({"seed": 4, "step": 4}, {"seed": 3, "step": 5}):
        assert not torch.equal(first.inputs, make(ROWS, **settings, **other).inputs)


def test_keys_and_values_are_told_apart():
    batch = synthetic.recall(200, num_pairs=16, vocab_size=33, seed=0, step=0)
    keys, values = batch.inputs[:, 0:32:2], batch.inputs[:, 1:32:2]
    assert (keys.min(), keys.max(), values.min(), values.max()) == (1, 16, 17, 32)
    assert all(len(set(row)) == 16 for row in keys.tolist())
    assert (batch.counted.sum(1) == 16).all()


def test_keys_come_back_early_more_often_than_late():
    """The chance of a place falls as about 1 / i: with one pair the first of two is drawn for 2/3.

    `1 / (1 + 2^-0.99) = 0.665`; four standard deviations of 20,000 draws are 0.0134.
    """
    batch = synthetic.recall(20_000, num_pairs=1, seed=0, step=0)
    assert abs(batch.counted[:, 2].float().mean() - 1 / (1 + 2**-0.99)) < 0.0134


def test_products_of_permutations_are_a_group():
    """With row a and column b, "b first, then a"; 0 is the identity."""
    table = torch.from_numpy(synthetic.products(3))
    every = torch.arange(6)
    assert torch.equal(table[0], every)
    assert torch.equal(table[:, 0], every)
    assert all(torch.equal(row.sort().values, every) for row in [*table, *table.T])
    for a, b, c in ((1, 2, 3), (5, 4, 1), (2, 5, 3)):
        assert table[a, table[b, c]] == table[table[a, b], c]
    assert not torch.equal(table, table.T)


@pytest.mark.parametrize("make", [synthetic.parity, partial(synthetic.permutations, size=3)])
def test_skipped_targets_do_not_count(make):
    batch = make(ROWS, length=10, skip=6, seed=0, step=0)
    whole = make(ROWS, length=10, seed=0, step=0)
    assert torch.equal(batch.inputs, whole.inputs)
    assert batch.counted.sum(0).tolist() == [0] * 6 + [ROWS] * 4
    assert torch.equal(batch.targets[:, 6:], whole.targets[:, 6:])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("recall", {"num_pairs": 17}, "17 pairs need a vocabulary of 35 at least."),
        ("recall", {"num_pairs": 0}, "num pairs is too small: choose a larger number."),
        ("copying", {"length": 0}, "length is too small: choose a larger number."),
        ("induction", {"length": 2}, "Induction needs 3 tokens at least"),
        ("parity", {"length": 4, "skip": 4}, "Of 4 targets 4 cannot be left out."),
        ("s3", {"size": 6}, "Permutations of 6 things are not made: choose a size from 2 to 5."),
        ("needle", {"distance": -1}, "distance is too small: choose a larger number."),
    ],
)
def test_what_cannot_be_made_is_refused(name, settings, said):
    make, usual, _, _ = CASES[name]
    with pytest.raises(DataError, match=said):
        make(ROWS, **{**usual, **settings}, seed=0, step=0)
    with pytest.raises(DataError, match="rows is too small"):
        make(0, **usual, seed=0, step=0)
