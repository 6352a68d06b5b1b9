"""What holds for every op in every form: state, causality, rows, documents, dtypes, memory."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers import (
    CASES,
    Case,
    assert_close,
    check_causality,
    check_form,
    check_rows,
    check_untouched,
    cut_time,
    flatten,
    in_pieces,
    make_inputs,
    map_tensors,
    oracle,
    run,
    way,
    ways,
)

from model.ops import OPS
from model.ops.attention import KVCache

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CHUNK_SIZE = 16


def rows(*names, **changes):
    """Every op and form with the cases of these names, where they apply, changed so."""
    found = [
        pytest.param(op, form, replace(CASES[name], **changes), id=f"{op}-{form}-{name}")
        for op in OPS
        for form in ways(op)
        for name in names
        if CASES[name].applies_to(op)
    ]
    return pytest.mark.parametrize(("op", "form", "case"), found)


every_form_and_case = rows(
    "reset_state",
    "channel_decay",
    "infinite_reset",
    "head_mixed_reset",
    "bonus_mixed_reset",
    "normalize_mixed",
    "score_square_l1",
    "score_sigmoid",
    "score_entmax",
    "score_user",
    time=37,
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def variant(op, form, chunk_size=CHUNK_SIZE):
    function = way(op, form)
    return partial(function, chunk_size=chunk_size) if form == "chunked" else function


@both_dtypes
@every_form_and_case
def test_a_split_sequence_carries_its_state(op, form, case, dtype):
    function = variant(op, form)
    for places in [(1,), (20, 21), (36,)]:
        check_form(in_pieces(function, *places), op, case, dtype)


@rows("reset_state", time=9)
def test_steps_of_one_token_equal_the_whole(op, form, case):
    check_form(in_pieces(variant(op, form), *range(1, 9)), op, case, torch.float64)


@rows("reset_state", time=20)
def test_another_form_may_continue(op, form, case):
    def prefill_then_step(**inputs):
        head, tail = (cut_time(inputs, part) for part in (slice(13), slice(13, None)))
        first, state = variant(op, form)(**head)
        rest, state = in_pieces(OPS[op].recurrent, *range(1, 7))(**tail | {"initial_state": state})
        return torch.cat([first, rest], dim=1), state

    check_form(prefill_then_step, op, case, torch.float64)


@both_dtypes
@pytest.mark.parametrize("cut", [1, 20])
@every_form_and_case
def test_the_future_is_unknown(op, form, case, dtype, cut):
    check_causality(variant(op, form), op, case, dtype, cut)


@pytest.mark.parametrize("poison", [False, True], ids=["other_numbers", "nan"])
@every_form_and_case
def test_rows_do_not_touch_each_other(op, form, case, poison):
    check_rows(variant(op, form), op, replace(case, batch=3), torch.float64, poison)


@every_form_and_case
def test_inputs_are_never_written_to(op, form, case):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):  # where nothing is converted too
        check_untouched(variant(op, form), op, case, dtype)


@every_form_and_case
def test_inputs_need_not_be_contiguous(op, form, case):
    def sparse(x):
        gap = torch.full_like(x, torch.nan) if x.is_floating_point() else ~x
        return torch.stack([x, gap], dim=-1)[..., 0]

    def strided(**inputs):
        return variant(op, form)(**{n: map_tensors(sparse, x) for n, x in inputs.items()})

    check_form(strided, op, case, torch.float32)


def visible(function):
    """The op for a single row, its cache less the tokens that are never seen again."""

    def shortened(**inputs):
        o, state = function(**inputs)
        if isinstance(state, KVCache):
            start = int(state.start)
            state = KVCache(state.key[:, start:], state.value[:, start:], state.start * 0)
        return o, state

    return shortened


def one_by_one(function):
    """The op for a single row, each of its documents on its own."""

    def separate(*, reset, initial_state=None, **inputs):
        starts = [t for t in reset[0].nonzero()[:, 0].tolist() if t > 0]
        outputs = []
        for begin, end in pairwise([0, *starts, reset.shape[1]]):
            document = cut_time(inputs, slice(begin, end))
            carried = None if reset[0, begin] else initial_state
            o, state = function(**document, initial_state=carried)
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    return separate


@pytest.mark.parametrize("starts", [(1, 36), (15, 16), (0, 8, 30)], ids=str)
@every_form_and_case
def test_reset_separates_documents(op, form, case, starts):
    inputs = make_inputs(op, replace(case, batch=1))
    inputs["reset"] = torch.zeros(1, case.time, dtype=torch.bool)
    inputs["reset"][0, list(starts)] = True
    expected = run(visible(one_by_one(OPS[op].recurrent)), inputs)
    assert_close(run(visible(variant(op, form)), inputs), expected, torch.float64)


@every_form_and_case
def test_reset_at_the_start_wipes_the_initial_state(op, form, case):
    def outputs(**inputs):
        return variant(op, form)(**inputs)[0], None

    inputs = make_inputs(op, case)
    inputs["reset"] = inputs.get("reset", torch.zeros(case.batch, case.time, dtype=torch.bool))
    inputs["reset"][:, 0] = True
    results = run(outputs, inputs)
    without = run(outputs, {n: x for n, x in inputs.items() if n != "initial_state"})
    assert_close({n: results[n] for n in without}, without, torch.float64)
    for name in results.keys() - without.keys():
        assert not results[name].any(), f"{name} is not zero"


@rows("state", time=20)
def test_no_reset_equals_a_reset_that_is_nowhere(op, form, case):
    inputs = make_inputs(op, case)
    inputs["reset"] = torch.zeros(2, 20, dtype=torch.bool)
    assert_close(run(variant(op, form), inputs), oracle(op, case), torch.float64)


@rows("reset_state", "infinite_reset", "bonus_mixed_reset", time=37)
def test_bfloat16_keeps_its_state_in_float32(op, form, case):
    def widened(x):
        return x.double() if x.is_floating_point() else x

    inputs = make_inputs(op, case, torch.bfloat16)
    exact = {n: map_tensors(widened, x) for n, x in inputs.items()}
    actual, expected = run(variant(op, form), inputs), run(OPS[op].recurrent, exact)
    if op != "attention":  # whose state is its inputs, kept as they are
        names = [name for name in actual if name.startswith("final_state")]
        state = {name: actual.pop(name) for name in names}
        reference = {name: expected.pop(name) for name in names}
        assert_close(state, reference, torch.float32, tolerance=1e-5)
    assert_close(actual, expected, torch.bfloat16, tolerance=2e-2)


@rows(
    *("reset_state", "channel_decay", "bonus_weak_reset", "normalize"),
    batch=1,
    time=5,
    heads=1,
    key_dim=2,
    value_dim=3,
)
def test_gradients_are_those_of_finite_differences(op, form, case):
    inputs, function = make_inputs(op, case), variant(op, form, chunk_size=2)
    flattened = dict(pair for n, x in inputs.items() for pair in flatten(n, x).items())
    names = [n for n, x in flattened.items() if x.is_floating_point()]

    def flat(*values):
        replaced = iter(values)

        def filled(x):
            return next(replaced) if x.is_floating_point() else x

        o, state = function(**{n: map_tensors(filled, x) for n, x in inputs.items()})
        return o, *(x for x in flatten("final_state", state).values() if x.is_floating_point())

    assert torch.autograd.gradcheck(flat, [flattened[n].requires_grad_() for n in names])


def saved_bytes(function, inputs):
    """Bytes that autograd keeps for the backward pass, each storage once."""
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    def leaf(x):
        return x.clone().requires_grad_(x.is_floating_point())

    leaves = {n: map_tensors(leaf, x) for n, x in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = function(**leaves)
    assert results[0].requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("op", OPS)
def test_memory_of_the_chunked_form_is_linear_in_time(op):
    case = Case(decay="mixed", reset=True, state=True, key_dim=8, value_dim=8).reduced_to(op)
    if op == "attention":  # with a mask the fused kernel keeps it
        case = replace(case, reset=False, state=False)

    def counts(form, *times):
        function = variant(op, form)
        return [saved_bytes(function, make_inputs(op, replace(case, time=t))) for t in times]

    for once, twice in pairwise(counts("chunked", 128, 256, 512)):
        assert 1.95 < twice / once < 2.05
    if op != "attention":  # the same measure sees the quadratic form
        once, twice = counts("parallel", 256, 512)
        assert twice / once > 3
