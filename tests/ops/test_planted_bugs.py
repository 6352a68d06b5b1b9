"""The checks can fail: each catches the faults it is there for, in every form of every op."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    CASES,
    arguments,
    check_causality,
    check_form,
    check_rows,
    check_untouched,
    every_way,
    has_heads,
    in_pieces,
    map_tensors,
    way,
    ways,
)

from model.ops import OPS
from model.ops.scores import SCORES
from model.ops.wkv4 import WKV4State

MATRIX_STATE = ("additive", "delta")
DTYPES = (torch.float64, torch.float32)


def late_decay(function):
    def wrapped(*, log_decay, **rest):
        late = torch.cat([torch.zeros_like(log_decay[:, :1]), log_decay[:, :-1]], dim=1)
        return function(log_decay=late, **rest)

    return wrapped


def early_decay_gradient(function):
    def wrapped(*, log_decay, **rest):
        moved = log_decay.roll(-1, dims=1)
        return function(log_decay=log_decay.detach() + (moved - moved.detach()), **rest)

    return wrapped


def detached(name):
    def plant(function):
        def wrapped(**inputs):
            return function(**inputs | {name: map_tensors(torch.detach, inputs[name])})

        return wrapped

    return plant


def without(name):
    return lambda function: lambda **inputs: function(**inputs | {name: None})


def transposed_final_state(function):
    def wrapped(**inputs):
        o, state = function(**inputs)
        return o, state.mT

    return wrapped


def transposed_memory_of_final_state(function):
    def wrapped(**inputs):
        o, state = function(**inputs)
        return o, state.mT.reshape(state.shape)

    return wrapped


def transposed_initial_state(function):
    def wrapped(*, initial_state, **rest):
        return function(initial_state=initial_state.mT.reshape(initial_state.shape), **rest)

    return wrapped


def single_precision(function):
    def wrapped(**inputs):
        def narrow(x):
            return x.float() if x.is_floating_point() else x

        o, state = function(**{n: map_tensors(narrow, x) for n, x in inputs.items()})
        return o.double(), map_tensors(lambda x: x.double() if x.is_floating_point() else x, state)

    return wrapped


def wrong_dtype(function):
    def wrapped(**inputs):
        o, state = function(**inputs)
        return o.to(torch.bfloat16), state

    return wrapped


def unscaled(function):
    return lambda **inputs: function(**inputs | {"scale": 1.0})


def decay_of_another_channel(function):
    def wrapped(*, log_decay, **rest):
        return function(log_decay=log_decay.roll(1, dims=-1), **rest)

    return wrapped


def hidden_tokens_counted(function):
    def wrapped(*, score, **rest):
        rule = SCORES[score].rule
        blind = replace(SCORES[score], rule=lambda s, visible: rule(s, torch.ones_like(visible)))
        return function(score=blind, **rest)

    return wrapped


def part_detached(name):
    def plant(function):
        def wrapped(*, initial_state, **rest):
            part = getattr(initial_state, name).detach()
            return function(initial_state=initial_state._replace(**{name: part}), **rest)

        return wrapped

    return plant


def another_common_factor(function):
    def wrapped(**inputs):
        o, (num, den, largest) = function(**inputs)
        return o, WKV4State(num * math.exp(0.1), den * math.exp(0.1), largest - 0.1)

    return wrapped


def gradient_of_largest_lost(function):
    def wrapped(**inputs):
        o, state = function(**inputs)
        return o, state._replace(max=state.max.detach() + 0 * state.num)

    return wrapped


def softmax_instead(function):
    return lambda **inputs: function(**inputs | {"score": "softmax"})


WITH_HEADS = tuple(op for op in OPS if has_heads(op))
VALUE_BUGS = {
    "decay_one_step_late": ("channel_decay", late_decay, WITH_HEADS),
    "decay_one_step_late_where_strong": ("mixed", late_decay, WITH_HEADS),
    "decay_of_another_channel": ("channel_decay", decay_of_another_channel, OPS),
    "gradient_of_decay_one_step_early": ("channel_decay", early_decay_gradient, WITH_HEADS),
    "gradient_of_initial_state_lost": ("state", detached("initial_state"), OPS),
    "gradient_of_q_lost": ("state", detached("q"), WITH_HEADS),
    "gradient_of_k_lost": ("state", detached("k"), OPS),
    "gradient_of_v_lost": ("state", detached("v"), OPS),
    "gradient_of_a_lost": ("state", detached("a"), ("delta",)),
    "gradient_of_b_lost": ("state", detached("b"), ("delta",)),
    "gradient_of_decay_lost": ("channel_decay", detached("log_decay"), OPS),
    "gradient_of_bonus_lost": ("bonus", detached("bonus"), OPS),
    "gradient_of_channel_bonus_lost": ("state", detached("bonus"), ("wkv4",)),
    "gradient_of_initial_num_lost": ("state", part_detached("num"), ("wkv4",)),
    "gradient_of_initial_den_lost": ("state", part_detached("den"), ("wkv4",)),
    "gradient_of_initial_max_lost": ("state", part_detached("max"), ("wkv4",)),
    "gradient_of_final_max_lost": ("state", gradient_of_largest_lost, ("wkv4",)),
    "initial_state_ignored": ("state", without("initial_state"), OPS),
    "reset_ignored": ("reset_state", without("reset"), OPS),
    "bonus_ignored": ("bonus", without("bonus"), WITH_HEADS),
    "scale_ignored": ("state", unscaled, WITH_HEADS),
    "final_state_transposed": ("state", transposed_final_state, MATRIX_STATE),
    "final_state_transposed_in_memory": (
        "state",
        transposed_memory_of_final_state,
        MATRIX_STATE,
    ),
    "initial_state_transposed_in_memory": ("state", transposed_initial_state, MATRIX_STATE),
    "final_state_of_another_common_factor": ("state", another_common_factor, ("wkv4",)),
    "hidden_tokens_counted": ("score_tanh", hidden_tokens_counted, ("attention",)),
    "hidden_tokens_summed": ("score_sigmoid_l1", hidden_tokens_counted, ("attention",)),
    "score_ignored": ("score_softpick", softmax_instead, ("attention",)),
    "output_in_another_dtype": ("plain", wrong_dtype, OPS),
}
"""The case in which a bug shows, the bug, and the ops that may have it."""


def plantable(op, bug):
    """Whether the op has what the bug breaks."""
    name, _, ops = VALUE_BUGS[bug]
    return op in ops and CASES[name].applies_to(op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "form", "bug"),
    [
        (op, form, bug)
        for op in OPS
        for form in ways(op)
        for bug in VALUE_BUGS
        if plantable(op, bug)
    ],
)
def test_a_wrong_value_is_caught(op, form, bug, dtype):
    name, plant, _ = VALUE_BUGS[bug]
    function = way(op, form)
    check_form(function, op, CASES[name], dtype)
    with pytest.raises(AssertionError, match=r"off by|, not "):
        check_form(plant(function), op, CASES[name], dtype)


@every_way(*MATRIX_STATE)
def test_a_transposed_state_is_caught_by_its_values_where_its_shape_fits(op, form):
    case = replace(CASES["state"], value_dim=8)
    with pytest.raises(AssertionError, match="final_state is off by"):
        check_form(transposed_final_state(way(op, form)), op, case, torch.float64)


@every_way(*OPS)
def test_too_little_precision_is_caught(op, form):
    with pytest.raises(AssertionError, match="off by"):
        check_form(single_precision(way(op, form)), op, CASES["state"], torch.float64)


def test_nan_is_caught():
    def broken(**inputs):
        o, state = OPS["additive"].chunked(**inputs)
        return torch.cat([o[:, :-1], o[:, -1:] * torch.nan], dim=1), state

    with pytest.raises(AssertionError, match="o is not finite"):
        check_form(broken, "additive", CASES["state"], torch.float64)


@pytest.mark.parametrize("op", OPS)
def test_a_state_that_is_not_carried_is_caught(op):
    def forgetful(**inputs):
        return OPS[op].chunked(**inputs | {"initial_state": None})

    with pytest.raises(AssertionError):
        check_form(in_pieces(forgetful, 5), op, CASES["reset_state"], torch.float64)


@pytest.mark.parametrize("op", OPS)
def test_a_look_into_the_future_is_caught(op):
    def prophetic(*, v, **rest):
        return OPS[op].chunked(v=v + 1e-6 * v.flip(1), **rest)

    with pytest.raises(AssertionError, match="off by"):
        check_causality(prophetic, op, CASES["state"], torch.float64, cut=6)


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_rows_that_touch_are_caught(op, poison):
    def mixing(*, k, **rest):
        return OPS[op].chunked(k=k + 1e-6 * k.mean(0, keepdim=True), **rest)

    with pytest.raises(AssertionError, match=r"off by|not finite"):
        check_rows(mixing, op, CASES["state"], torch.float64, poison)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op in OPS
        for name in ("q", "k", "v", "initial_state", "reset")
        if name in arguments(op)
    ],
)
def test_a_write_to_an_input_is_caught(op, name):
    def writing(**inputs):
        value = inputs[name]
        value = value if torch.is_tensor(value) else value[0]
        value.copy_(value.clone())
        return OPS[op].chunked(**inputs)

    with pytest.raises(AssertionError, match="was written to"):
        check_untouched(writing, op, CASES["reset_state"], torch.float64)
