"""Tasks with a known answer, which show what the loss on text hides: recall and state tracking.

Every function makes one batch, and nothing but its arguments decides what is in it. Rows are drawn
independently; a target counts where the answer follows from what stands before it.
"""

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data.errors import DataError

Ints = npt.NDArray[np.int64]

RECALL_EXPONENT = 0.01
"""Of the gaps in `recall`: the paper's alpha."""


class SyntheticBatch(NamedTuple):
    """Sequences, what is to follow each token, and where that can be known.

    Attributes:
        inputs: int64 ``[B, T]``.
        targets: int64 ``[B, T]``; 0 where it does not count.
        counted: bool ``[B, T]``, True for the targets that count, at least one in every row.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    counted: torch.Tensor


def recall(
    rows: int, *, num_pairs: int, vocab_size: int = 128, seed: int, step: int
) -> SyntheticBatch:
    """Multi-query associative recall (MQAR, arXiv 2312.04927, section 4 and appendix E).

    First the pairs, key and value in turn; then every key once more, where its value is the target.
    The keys of a row are all different. A key comes back early more often than late: the place i of
    its return, counted from 1 in steps of two tokens, is drawn without replacement with a chance
    that falls as the power `i^(0.01 - 1)`. There are twice as many places as pairs.

    Vocabulary: 0 fills the places between; the first half of the others are keys, the rest values.
    Length: `6 num_pairs`.

    Raises:
        DataError: for more pairs than keys, or numbers below 1.
    """
    random = _random(rows, seed, step, num_pairs=num_pairs)
    num_keys = (vocab_size - 1) // 2
    if num_pairs > num_keys:
        raise DataError(f"{num_pairs} pairs need a vocabulary of {2 * num_pairs + 1} at least.")
    keys = 1 + _distinct(random, rows, num_keys, num_pairs)
    values = random.integers(1 + num_keys, vocab_size, (rows, num_pairs))
    places = 2 * num_pairs
    chances = np.arange(1.0, places + 1) ** (RECALL_EXPONENT - 1)
    # The largest of log chance + Gumbel noise are a draw without replacement (Yellott, 1977).
    scores = np.log(chances) + random.gumbel(size=(rows, places))
    slots = random.permuted(np.argsort(-scores, axis=1)[:, :num_pairs], axis=1)
    inputs, targets, counted = _blank(rows, 6 * num_pairs)
    inputs[:, 0 : 2 * num_pairs : 2], inputs[:, 1 : 2 * num_pairs : 2] = keys, values
    asked = 2 * num_pairs + 2 * slots
    np.put_along_axis(inputs, asked, keys, axis=1)
    np.put_along_axis(targets, asked, values, axis=1)
    np.put_along_axis(counted, asked, True, axis=1)
    return _batch(inputs, targets, counted)


def copying(
    rows: int, *, length: int, vocab_size: int = 16, seed: int, step: int
) -> SyntheticBatch:
    """Copying (arXiv 2402.01032, section 3): random symbols, a sign, and the same symbols again.

    The copy is read as it goes on, as when a model writes it; its symbols are the targets.

    Vocabulary: 0 is the sign, the others are symbols. Length: `2 length`.

    Raises:
        DataError: for numbers below 1.
    """
    random = _random(rows, seed, step, length=length)
    symbols = random.integers(1, vocab_size, (rows, length))
    inputs, targets, counted = _blank(rows, 2 * length)
    inputs[:, :length], inputs[:, length + 1 :] = symbols, symbols[:, :-1]
    targets[:, length:], counted[:, length:] = symbols, True
    return _batch(inputs, targets, counted)


def induction(
    rows: int, *, length: int, vocab_size: int = 16, seed: int, step: int
) -> SyntheticBatch:
    """Induction heads (arXiv 2209.11895; as a task, arXiv 2312.00752, section 4.1.2).

    Among random symbols a sign comes once, anywhere, and again as the last token: the target there
    is the symbol that followed it the first time.

    Vocabulary: 0 is the sign, the others are symbols. Length: `length`, at least 3.

    Raises:
        DataError: for a length below 3, or numbers below 1.
    """
    random = _random(rows, seed, step, length=length)
    if length < 3:
        raise DataError("Induction needs 3 tokens at least: the sign, a symbol, and the sign.")
    inputs, targets, counted = _blank(rows, length)
    inputs[:, :-1] = random.integers(1, vocab_size, (rows, length - 1))
    row, place = np.arange(rows), random.integers(0, length - 2, rows)
    targets[:, -1], counted[:, -1] = inputs[row, place + 1], True
    inputs[row, place] = 0
    return _batch(inputs, targets, counted)


def parity(rows: int, *, length: int, skip: int = 0, seed: int, step: int) -> SyntheticBatch:
    """Parity: whether the number of ones so far is odd (arXiv 2411.12537, section 3; 2207.02098).

    A state of one bit, which every one turns over. The target of each token is the state after it.

    Vocabulary: the bits 0 and 1, which are also the answers. Length: `length`; the first `skip`
    targets do not count.

    Raises:
        DataError: for a length below 1, or a skip that leaves nothing.
    """
    random = _random(rows, seed, step, length=length)
    inputs = random.integers(0, 2, (rows, length))
    return _tracked(inputs, np.cumsum(inputs, axis=1) % 2, skip)


def permutations(
    rows: int, *, size: int, length: int, skip: int = 0, seed: int, step: int
) -> SyntheticBatch:
    """The word problem of a symmetric group S_n (arXiv 2404.08819, section 3).

    Each token is a permutation of `size` things, and its target the product of all so far: the
    first is applied first. S3 can be solved by a fixed number of layers of diagonal recurrences
    with complex or negative eigenvalues; S5 cannot (it is complete for NC1).

    Vocabulary: the n! permutations in lexicographic order, 0 the identity. Length: `length`; the
    first `skip` targets do not count.

    Raises:
        DataError: for a length below 1, a skip that leaves nothing, or a size outside 2 to 5.
    """
    random = _random(rows, seed, step, length=length)
    if not 2 <= size <= 5:
        raise DataError(f"Permutations of {size} things are not made: choose a size from 2 to 5.")
    table = products(size)
    inputs = random.integers(0, len(table), (rows, length))
    state, states = np.zeros(rows, dtype=np.int64), np.empty_like(inputs)
    for t in range(length):
        state = table[inputs[:, t], state]
        states[:, t] = state
    return _tracked(inputs, states, skip)


def needle(
    rows: int, *, distance: int, before: int = 8, vocab_size: int = 32, seed: int, step: int
) -> SyntheticBatch:
    """One needle in a haystack, found again after a distance (after arXiv 2305.16300, section 4.2).

    Hay, a value, `distance` tokens of hay, and a question: the target there is the value. Values
    occur nowhere else, so that what is asked is whether one is still held, not how to find it;
    `recall` and `induction` ask for that.

    Vocabulary: 0 is the question; the first half of the others are hay, the rest values. Length:
    `before + distance + 2`.

    Raises:
        DataError: for a negative distance, or numbers below 1.
    """
    random = _random(rows, seed, step, distance=distance + 1)
    num_hay = (vocab_size - 1) // 2
    inputs, targets, counted = _blank(rows, before + distance + 2)
    inputs[:, :-1] = random.integers(1, 1 + num_hay, (rows, inputs.shape[1] - 1))
    values = random.integers(1 + num_hay, vocab_size, rows)
    inputs[:, before], targets[:, -1], counted[:, -1] = values, values, True
    return _batch(inputs, targets, counted)


def products(size: int) -> Ints:
    """`[n!, n!]`: the number of the permutation "column first, then row"."""
    group = list(itertools.permutations(range(size)))
    number = {permutation: place for place, permutation in enumerate(group)}
    return np.array(
        [[number[tuple(after[i] for i in first)] for first in group] for after in group]
    )


def _random(rows: int, seed: int, step: int, **amounts: int) -> np.random.Generator:
    for name, value in {"rows": rows, **amounts}.items():
        if value < 1:
            raise DataError(f"{name.replace('_', ' ')} is too small: choose a larger number.")
    return np.random.default_rng([seed, step, *amounts.values()])


def _distinct(random: np.random.Generator, rows: int, of: int, count: int) -> Ints:
    """`[rows, count]` of the numbers below `of`, different within a row, in random order."""
    return np.argsort(random.random((rows, of)), axis=1)[:, :count]


def _blank(rows: int, length: int) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    shape = (rows, length)
    return np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)


def _tracked(inputs: Ints, states: Ints, skip: int) -> SyntheticBatch:
    if not 0 <= skip < inputs.shape[1]:
        raise DataError(f"Of {inputs.shape[1]} targets {skip} cannot be left out.")
    counted = np.zeros(inputs.shape, np.bool_)
    counted[:, skip:] = True
    return _batch(inputs, np.where(counted, states, 0), counted)


def _batch(inputs: Ints, targets: Ints, counted: npt.NDArray[np.bool_]) -> SyntheticBatch:
    return SyntheticBatch(*(torch.from_numpy(array) for array in (inputs, targets, counted)))
