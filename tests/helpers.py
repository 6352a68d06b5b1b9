"""What the tests of the ops share: the checks of `ebb verify`, as assertions.

A check takes the function under test, so that the tests can also feed it a broken one.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from model.ops import FORMS, OPS, native
from train.verify.inputs import (
    CASES,
    DECAYS,
    SCORES_TESTED,
    Case,
    arguments,
    has_heads,
    make_inputs,
    spread,
)
from train.verify.running import (
    TIMED,
    TOLERANCE,
    all_tensors,
    cut_time,
    differences,
    filled_with_nan,
    first_row,
    flatten,
    in_pieces,
    is_timed,
    map_tensors,
    outputs_before,
    run,
    with_future,
    with_other_rows,
)

__all__ = [
    "CASES",
    "DECAYS",
    "SCORES_TESTED",
    "TIMED",
    "TOLERANCE",
    "Case",
    "arguments",
    "assert_close",
    "check_causality",
    "check_form",
    "check_rows",
    "check_untouched",
    "cut_time",
    "every_way",
    "flatten",
    "has_heads",
    "in_pieces",
    "is_timed",
    "make_inputs",
    "map_tensors",
    "oracle",
    "outputs_before",
    "run",
    "spread",
    "variants",
    "way",
    "ways",
]


def ways(op):
    """The ways to run an op: its forms in PyTorch, and `native` where it has compiled kernels."""
    has_kernels = OPS[op].native is not None and native.is_available()
    return (*FORMS, "native") if has_kernels else FORMS


def way(op, name):
    """The op, run that way."""
    if name == "native":
        return OPS[op].form("chunked", backend="native")
    return OPS[op].form(name, backend="torch")


def every_way(*ops):
    """Runs a test for each way of each op."""
    found = [pytest.param(op, name, id=f"{op}-{name}") for op in ops for name in ways(op)]
    return pytest.mark.parametrize(("op", "form"), found)


def variants(op, *chunk_sizes):
    """The ways to run an op by name, the chunked one with each chunk size; None is its default."""
    found = {name: way(op, name) for name in ways(op) if name != "chunked"}
    for size in chunk_sizes:
        chosen = {} if size is None else {"chunk_size": size}
        found[f"chunked_{size or 'default'}"] = partial(OPS[op].chunked, **chosen)
    return found


@cache
def oracle(op, case):
    """The results of the recurrent form in float64."""
    return run(OPS[op].recurrent, make_inputs(op, case))


def assert_close(actual, expected, dtype, tolerance=None):
    """The same names, shapes, dtypes, all finite, and values within the tolerance of the largest.

    `dtype` is what the floating-point tensors of `actual` must have; the tolerance is that of the
    dtype where it is not given.
    """
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    for difference in differences(actual, expected, dtype):
        assert difference.error <= tolerance, f"{difference.problem}, allowed {tolerance}"


def check_form(function, op, case, dtype):
    """Outputs, final state and all gradients are those of the recurrent form in float64."""
    assert_close(run(function, make_inputs(op, case, dtype)), oracle(op, case), dtype)


def check_untouched(function, op, case, dtype):
    """No input is written to, neither its values nor its version."""
    inputs = make_inputs(op, case, dtype)
    before = {name: (x._version, x.clone()) for name, x in all_tensors(inputs).items()}
    function(**inputs)
    for name, x in all_tensors(inputs).items():
        version, values = before[name]
        assert x._version == version, f"{name} was written to"
        assert torch.equal(x, values), f"{name} has changed"


def check_rows(function, op, case, dtype, poison):
    """What the other rows of a batch hold does not reach the first: other numbers, or NaN."""
    inputs = make_inputs(op, case, dtype)
    if poison:  # but for decays, the strongest of which chooses the blocks
        kept = ("log_decay", "reset")
        others = {n: filled_with_nan(x) for n, x in inputs.items() if n not in kept}
    else:
        others = make_inputs(op, replace(case, seed=case.seed + 1), dtype)
    mixed = with_other_rows(inputs, others)
    assert_close(first_row(run(function, mixed)), first_row(oracle(op, case)), dtype)


def check_causality(function, op, case, dtype, cut):
    """Outputs before `cut` do not depend on later inputs, and no gradient goes there from them."""
    inputs = make_inputs(op, case, dtype)
    changed = with_future(inputs, make_inputs(op, replace(case, seed=case.seed + 1), dtype), cut)
    expected = run(outputs_before(OPS[op].recurrent, cut), make_inputs(op, case))
    actual = run(outputs_before(function, cut), changed)
    assert_close(actual, expected, dtype)
