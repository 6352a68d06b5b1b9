"""Batches: a function of seed and step, every token once, documents told apart."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.loader import TrainingBatches, sequential_stretches, validation_batches, window_stretches

END = 60_000


def numbered(length: int) -> np.ndarray:
    """Tokens that are their own positions, so that a batch shows where it was cut."""
    return np.arange(length, dtype=np.uint16)


def same(a, b) -> bool:
    resets = (a.reset is None) == (b.reset is None) and (
        a.reset is None or torch.equal(a.reset, b.reset)
    )
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and resets


@given(
    length=st.integers(9, 200),
    batch_size=st.integers(1, 7),
    context=st.integers(1, 8),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_covers_its_windows_once(length, batch_size, context, seed):
    batches = TrainingBatches(
        numbered(length), context=context, batch_size=batch_size, seed=seed, end_id=END
    )
    per_epoch = batches.windows_per_epoch
    assert batches.steps_per_epoch == -(-per_epoch // batch_size)
    assert per_epoch * context > length - 1 - 2 * context
    steps = [batches[step] for step in range(-(-3 * per_epoch // batch_size))]
    inputs = torch.cat([batch.inputs for batch in steps])
    targets = torch.cat([batch.targets for batch in steps])
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == (len(steps) * batch_size, context)
    assert torch.equal(targets, inputs + 1)
    assert targets.max() < length
    for epoch in range(3):
        starts = inputs[epoch * per_epoch : (epoch + 1) * per_epoch, 0].sort().values
        assert 0 <= starts[0] < context
        assert torch.equal(starts, starts[0] + context * torch.arange(per_epoch))


def test_a_step_depends_on_the_seed_and_nothing_else():
    tokens = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)

    def make(seed=1):
        return TrainingBatches(tokens, context=16, batch_size=4, seed=seed, end_id=49)

    whole = make()
    straight = [whole[step] for step in range(100)]
    resumed = make()
    assert all(same(resumed[step], straight[step]) for step in (99, 57, 58, 3, 57))
    assert not same(make(2)[0], straight[0])
    assert len({tuple(batch.inputs.flatten().tolist()) for batch in straight}) == 100


def test_offset_and_order_change_with_the_epoch():
    batches = TrainingBatches(numbered(1000), context=10, batch_size=98, seed=0, end_id=END)
    assert batches.windows_per_epoch == 98
    starts = [batches[step].inputs[:, 0] for step in range(40)]
    offsets = {int(row.min()) for row in starts}
    assert offsets == set(range(10))
    assert len({tuple((row - row.min()).tolist()) for row in starts}) == 40
    assert batches[0].reset is None or int(starts[0].min()) == 0


def test_batch_larger_than_an_epoch_takes_windows_of_several():
    batches = TrainingBatches(numbered(9), context=8, batch_size=5, seed=0, end_id=END)
    assert batches.windows_per_epoch == batches.steps_per_epoch == 1
    assert batches[7].inputs.tolist() == [list(range(8))] * 5


def test_reset_is_at_every_end_token():
    tokens = np.array([1, 2, 9, 3, 9, 9, 4, 5, 6, 7, 8, 1, 2], dtype=np.uint16)
    ends = {2, 4, 5}
    batches = [
        *(TrainingBatches(tokens, context=3, batch_size=2, seed=s, end_id=9)[s] for s in range(9)),
        *validation_batches(tokens, context=3, batch_size=2, end_id=9),
        *sequential_stretches(tokens, context=3, end_id=9),
    ]
    seen = set()
    for batch in batches:
        for row in range(batch.inputs.shape[0]):
            # Three tokens and the next are found at one place only in this text.
            window = [*batch.inputs[row].tolist(), int(batch.targets[row, -1])]
            [at] = [i for i in range(13) if tokens[i : i + len(window)].tolist() == window]
            reset = [at + j in ends for j in range(len(window) - 1)]
            seen |= {at + j for j, value in enumerate(reset) if value}
            assert reset == (
                [False] * len(reset) if batch.reset is None else batch.reset[row].tolist()
            )
        assert batch.reset is None or (batch.reset.any() and batch.reset.dtype == torch.bool)
    assert seen == ends
    last = list(sequential_stretches(tokens, context=3, end_id=9))[-1]
    assert last.reset is None


def test_validation_windows_follow_one_another():
    batches = list(validation_batches(numbered(105), context=10, batch_size=4, end_id=END))
    assert [batch.inputs.shape for batch in batches] == [(4, 10), (4, 10), (2, 10)]
    inputs = torch.cat([batch.inputs for batch in batches])
    assert torch.equal(inputs.flatten(), torch.arange(100))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), inputs + 1)


def test_limited_validation_is_spread_evenly():
    def starts(max_tokens):
        batches = validation_batches(
            numbered(1001), context=10, batch_size=3, end_id=END, max_tokens=max_tokens
        )
        return torch.cat([batch.inputs[:, 0] for batch in batches]).tolist()

    assert starts(49) == [0, 250, 500, 750]
    assert starts(70) == [0, 140, 280, 420, 570, 710, 850]
    assert starts(1) == [0]
    assert starts(10**6) == list(range(0, 1000, 10)) == starts(1000)


@given(length=st.integers(2, 100), context=st.integers(1, 30))
def test_stretches_cover_everything_in_order(length, context):
    stretches = list(sequential_stretches(numbered(length), context=context, end_id=END))
    inputs = torch.cat([stretch.inputs for stretch in stretches], dim=1)
    assert inputs.tolist() == [list(range(length - 1))]
    assert torch.equal(torch.cat([stretch.targets for stretch in stretches], dim=1), inputs + 1)
    assert {stretch.inputs.shape[1] for stretch in stretches[:-1]} <= {context}


@pytest.mark.parametrize("stretch", [1, 4, 9, 50])
def test_windows_are_cut_into_stretches(stretch):
    starts = np.array([0, 20, 7])
    batches = [*window_stretches(numbered(30), starts, length=9, stretch=stretch, end_id=END)]
    assert max(batch.inputs.shape[1] for batch in batches) == min(stretch, 9)
    inputs = torch.cat([batch.inputs for batch in batches], dim=1)
    assert inputs.tolist() == [[*range(start, start + 9)] for start in starts]
    assert torch.equal(torch.cat([batch.targets for batch in batches], dim=1), inputs + 1)


def test_memory_map_is_read_without_a_warning_and_not_written(tmp_path):
    numbered(100).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    batch = TrainingBatches(tokens, context=8, batch_size=2, seed=0, end_id=END)[0]
    batch.inputs.zero_()
    assert tokens.tolist() == list(range(100))
    assert batch.targets.min() > 0


def test_mistakes():
    make = {"context": 9, "batch_size": 1, "end_id": END}
    for length in (0, 1, 9):
        message = f"has {length} tokens, fewer than one context of 9"
        with pytest.raises(DataError, match=f"training text {message}"):
            TrainingBatches(numbered(length), seed=0, **make)
        with pytest.raises(DataError, match=f"validation text {message}"):
            validation_batches(numbered(length), **make)
    with pytest.raises(DataError, match="has 1 tokens"):
        sequential_stretches(numbered(1), context=9, end_id=END)
    with pytest.raises(DataError, match="seed is -1"):
        TrainingBatches(numbered(10), seed=-1, **make)
    for wrong in ({"context": 0}, {"batch_size": 0}):
        with pytest.raises(DataError, match="counted from 1"):
            TrainingBatches(numbered(10), seed=0, **{**make, **wrong})
    with pytest.raises(IndexError):
        TrainingBatches(numbered(10), seed=0, **make)[-1]
