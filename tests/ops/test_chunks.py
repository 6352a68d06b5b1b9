"""The native additive recurrence by chunks, in sizes too at which it would go token by token."""

from dataclasses import replace

import pytest
import torch
from helpers import CASES, Case, assert_close, check_form, make_inputs, run, way

from model.ops import OPS, native
from model.ops.native import loading, scan

pytestmark = [
    pytest.mark.skipif(not native.is_available(), reason=native.status()),
    pytest.mark.usefixtures("by_chunks", "poisoned_memory"),
]

TIMES = (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 257)
SIZES = [(16, 16), (64, 64), (128, 64), (16, 128), (1, 1), (7, 80), (70, 9), (64, 65)]

every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture
def by_chunks(monkeypatch):
    """Whatever the sizes."""
    monkeypatch.setattr(scan, "SHORTEST_BY_CHUNKS", 1)
    monkeypatch.setattr(scan, "SMALLEST_BY_CHUNKS", 1)


def without_channels(case):
    """The same case with a decay a head in place of one a channel."""
    return replace(case, per_channel=False)


HEAD_CASES = {
    name: without_channels(case)
    for name, case in CASES.items()
    if case.applies_to("additive") and not case.bonus
}


@every_dtype
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", HEAD_CASES)
def test_every_case_and_length(name, time, dtype):
    check_form(way("additive", "native"), "additive", replace(HEAD_CASES[name], time=time), dtype)


@every_dtype
@pytest.mark.parametrize(("key_dim", "value_dim"), SIZES, ids=str)
@pytest.mark.parametrize("instructions", loading.INSTRUCTION_SETS)
def test_heads_of_every_size_on_every_processor(instructions, key_dim, value_dim, dtype):
    library = native.library()
    widest = library.instruction_set()
    try:
        if library.use_instruction_set(instructions) != instructions:
            pytest.skip(f"the processor has no {instructions}")
        for name in ("head_mixed_reset", "infinite_reset"):
            case = replace(HEAD_CASES[name], key_dim=key_dim, value_dim=value_dim, time=45)
            check_form(way("additive", "native"), "additive", replace(case, scale=0.35), dtype)
    finally:
        library.use_instruction_set(widest)


def test_a_decay_of_zero_cuts_off_what_was_before_it():
    """In the middle of a chunk too, however large that was."""
    inputs = make_inputs("additive", replace(CASES["head_decay"], time=40, scale=1.0))
    inputs["log_decay"][:, 37] = -torch.inf
    inputs["v"][:, :37] *= 1e100
    later = {name: inputs[name][:, 37:] for name in ("q", "k", "v", "log_decay")}
    o, state = OPS["additive"].native(**inputs)
    expected_o, expected_state = OPS["additive"].recurrent(**later)
    torch.testing.assert_close(o[:, 37:], expected_o, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-9, atol=1e-12)


@every_dtype
def test_one_by_one_is_the_same(monkeypatch, dtype):
    inputs = make_inputs("additive", replace(CASES["head_mixed_reset"], time=100), dtype)
    chunks = run(OPS["additive"].native, inputs)
    monkeypatch.setattr(scan, "SHORTEST_BY_CHUNKS", 1000)
    assert_close(chunks, run(OPS["additive"].native, inputs), dtype)


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_two_threads_compute_what_one_does_to_the_bit(heads):
    """A head is never shared by two threads, if it has q and k of its own."""
    case = Case(decay="weak", per_channel=False, state=True, batch=1, heads=heads, time=70)
    inputs = make_inputs("additive", replace(case, key_dim=40, value_dim=150))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(way("additive", "native"), inputs))
    first, *others = results
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_an_inference_keeps_no_states():
    inputs = make_inputs("additive", replace(CASES["head_decay"], time=100))
    o, state = OPS["additive"].native(**inputs)
    inputs["v"].requires_grad_()
    for x, y in zip((o, state), OPS["additive"].native(**inputs), strict=True):
        assert torch.equal(x, y)
