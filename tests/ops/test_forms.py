"""Every op, form and case against the recurrent form in float64, gradients included."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    CASES,
    DECAYS,
    Case,
    assert_close,
    check_form,
    has_heads,
    make_inputs,
    run,
    variants,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ops import OPS

CHUNK_SIZES = (1, 16, 64, None)
TIMES = {1: 2, 2: 2, 15: 2, 16: 2, 17: 2, 63: 2}
LONG_TIMES = {64: 2, 65: 2, 257: 1, 1000: 1}
"""Lengths, and how many heads they have."""
LONG_CASES = (
    "state",
    "reset_state",
    "head_mixed_reset",
    "steady_reset",
    "wide",
    "bonus_infinite_reset",
    "normalize_mixed",
)
SCORE_TIMES = {1: 2, 17: 2, 63: 1}
"""Of the cases with another score than softmax."""
UNIT_CHUNKS_UNTIL = 17
RECURRENT_AGAIN_UNTIL = 65

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def times(name, case):
    """The lengths of a case, and how many heads they have."""
    if case.score is not None:
        return SCORE_TIMES
    return TIMES | LONG_TIMES if name in LONG_CASES else TIMES


def shaped(op, case, time, heads):
    """The case at that length. The parallel form of channels holds all pairs for each of them."""
    narrow = {} if has_heads(op) else {"key_dim": 4 * heads}
    return replace(case, time=time, heads=heads, **narrow)


ROWS = [
    pytest.param(op, shaped(op, case, time, heads), id=f"{op}-{name}-{time}")
    for op in OPS
    for name, case in CASES.items()
    for time, heads in times(name, case).items()
    if case.applies_to(op)
]


def forms(op, time, dtype):
    """The forms worth their time at this length."""
    found = variants(op, *CHUNK_SIZES)
    if time > UNIT_CHUNKS_UNTIL:
        del found["chunked_1"]
    if time > RECURRENT_AGAIN_UNTIL or dtype == torch.float64:
        del found["recurrent"]  # in float64 it is what the others are compared with
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_forms_agree(op, case, dtype):
    failures = []
    for form, function in forms(op, case.time, dtype).items():
        try:
            check_form(function, op, case, dtype)
        except AssertionError as error:
            failures.append(f"{form}: {error}")
    assert not failures, "\n".join(failures)


@st.composite
def cases(draw, op):
    """Any case that applies to the op, in small shapes.

    There is always something to decay: where a gradient is all zeros, nothing is relative to it.
    """
    normalize, reset = draw(st.booleans()), draw(st.booleans())
    decay = draw(st.sampled_from((None, *DECAYS)))
    case = Case(
        decay=decay,
        per_channel=draw(st.booleans()),
        bonus=draw(st.booleans()),
        normalize=normalize,
        eps=1.0 if normalize else None,
        state=decay is not None or draw(st.booleans()),
        reset=reset,
        scale=draw(st.sampled_from([1.0, 0.35, -2.0])),
        batch=draw(st.integers(1, 3)),
        time=draw(st.integers(3 if reset else 1, 40)),
        heads=draw(st.integers(1, 3)),
        key_dim=draw(st.integers(1, 9)),
        value_dim=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 1000)),
    )
    return case.reduced_to(op)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=25)
@given(data=st.data(), chunk_size=st.integers(1, 45))
def test_forms_agree_for_any_shape(op, data, chunk_size):
    case = data.draw(cases(op))
    inputs = make_inputs(op, case)
    expected = run(OPS[op].recurrent, inputs)
    for function in variants(op, chunk_size).values():
        assert_close(run(function, inputs), expected, torch.float64)
