"""The recurrent forms against the formulas written out, and what the ops reduce to."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    CASES,
    Case,
    assert_close,
    every_way,
    make_inputs,
    map_tensors,
    run,
    way,
    ways,
)
from torch import Tensor

from model.ops import FORMS, OPS
from model.ops.wkv4 import WKV4State

every_form = pytest.mark.parametrize("form", FORMS)
every_way_of_recurrences = pytest.mark.parametrize("form", ways("delta"))


def scalars(op, case):
    """Inputs as NumPy arrays, and outputs and state of the recurrent form as well."""
    inputs = make_inputs(op, case)
    o, state = OPS[op].recurrent(**inputs)
    arrays = {n: x.numpy() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    return arrays, o.numpy(), state


@pytest.mark.parametrize(
    "name",
    [name for name, case in CASES.items() if case.applies_to("additive")],
)
def test_additive_is_its_formula(name):
    case = replace(CASES[name], time=9)
    x, o, final_state = scalars("additive", case)
    for b, h in np.ndindex(case.batch, case.heads):
        state = np.zeros((case.key_dim, case.value_dim + case.normalize))
        if case.state:
            state = x["initial_state"][b, h]
        for t in range(case.time):
            q, k, v = (x[n][b, t, h] for n in "qkv")
            if case.normalize:
                v = np.append(v, 1.0)
            if case.reset and x["reset"][b, t]:
                state = np.zeros_like(state)
            decay = np.ones(case.key_dim) * np.exp(x["log_decay"][b, t, h] if case.decay else 0.0)
            new = np.diag(decay) @ state + np.outer(k, v)
            read = state + np.diag(x["bonus"][h]) @ np.outer(k, v) if case.bonus else new
            expected = case.scale * q @ read
            if case.normalize:
                expected = expected[:-1] / (expected[-1] + (1e-6 if case.eps is None else case.eps))
            np.testing.assert_allclose(o[b, t, h], expected, rtol=1e-9, atol=1e-11)
            state = new
        np.testing.assert_allclose(final_state[b, h], state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name",
    [name for name, case in CASES.items() if case.applies_to("delta")],
)
def test_delta_is_its_formula(name):
    case = replace(CASES[name], time=9)
    x, o, final_state = scalars("delta", case)
    for b, h in np.ndindex(case.batch, case.heads):
        state = np.zeros((case.key_dim, case.value_dim))
        if case.state:
            state = x["initial_state"][b, h]
        for t in range(case.time):
            q, k, v, a, put_back = (x[n][b, t, h] for n in ("q", "k", "v", "a", "b"))
            if case.reset and x["reset"][b, t]:
                state = np.zeros_like(state)
            decay = np.ones(case.key_dim) * np.exp(x["log_decay"][b, t, h] if case.decay else 0.0)
            state = (np.diag(decay) + np.outer(put_back, a)) @ state + np.outer(k, v)
            expected = case.scale * q @ state
            np.testing.assert_allclose(o[b, t, h], expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(final_state[b, h], state, rtol=1e-9, atol=1e-11)


def explicit_attention(q, k, v, *, scale, reset=None, initial_state=None):
    """The whole T x (S + T) matrix of weights, without the fused kernel."""
    time = v.shape[1]
    if initial_state is None:
        old, first = 0, torch.zeros(v.shape[0], dtype=torch.long)
    else:
        old, first = initial_state.key.shape[1], initial_state.start
        k, v = torch.cat([initial_state.key, k], 1), torch.cat([initial_state.value, v], 1)
    scores = scale * torch.einsum("bihk,bjhk->bhij", q, k)
    hidden = torch.ones(v.shape[0], time, old + time, dtype=torch.bool)
    for b in range(v.shape[0]):
        begin = int(first[b])
        for t in range(time):
            if reset is not None and reset[b, t]:
                begin = old + t
            hidden[b, t, begin : old + t + 1] = False
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhij,bjhv->bihv", weights, v), None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_form
@pytest.mark.parametrize("name", ["plain", "state", "reset", "reset_state"])
def test_attention_is_its_formula(name, form, dtype):
    case = replace(CASES[name], time=23)

    def outputs(**inputs):
        return OPS["attention"].form(form)(**inputs)[0], None

    expected = run(explicit_attention, make_inputs("attention", case))
    assert_close(run(outputs, make_inputs("attention", case, dtype)), expected, dtype)


def test_softmax_of_two_tokens_by_hand():
    q, k = torch.tensor([0.0, 1.0]), torch.tensor([5.0, math.log(3)])
    v = torch.tensor([2.0, 10.0])
    q, k, v = (x.view(1, 2, 1, 1) for x in (q, k, v))
    k[0, 0] = 0.0
    for form in FORMS:
        o, _ = OPS["attention"].form(form)(q, k, v)
        torch.testing.assert_close(o.flatten(), torch.tensor([2.0, 8.0]))


@every_way("additive", "delta")
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_decay_of_zero_is_no_decay(op, form, per_channel):
    case = Case(decay="zero", per_channel=per_channel, state=True, reset=True, time=40)
    inputs = make_inputs(op, case)
    actual = run(way(op, form), inputs)
    del actual["grad log_decay"], inputs["log_decay"]
    assert_close(actual, run(way(op, form), inputs), torch.float64)


@every_way("additive", "delta")
def test_a_decay_for_each_head_is_one_for_all_its_channels(op, form):
    inputs = make_inputs(op, Case(decay="weak", per_channel=False, state=True, time=40))
    expected = run(way(op, form), inputs)

    def broadcast(*, log_decay, **rest):
        return way(op, form)(log_decay=log_decay[..., None].expand_as(rest["k"]), **rest)

    assert_close(run(broadcast, inputs), expected, torch.float64)


@every_way_of_recurrences
@pytest.mark.parametrize("name", ["state", "head_mixed_reset", "infinite_reset"])
def test_delta_that_removes_nothing_is_additive(form, name):
    inputs = make_inputs("additive", replace(CASES[name], time=40))

    def delta(**rest):
        nothing = torch.zeros_like(rest["k"])
        return way("delta", form)(a=nothing, b=nothing, **rest)

    assert_close(run(delta, inputs), run(OPS["additive"].recurrent, inputs), torch.float64)


@every_way_of_recurrences
@pytest.mark.parametrize("decay", [None, "zero"])
def test_a_bonus_of_one_without_decay_reads_after_the_write(form, decay):
    inputs = make_inputs("additive", Case(decay=decay, state=True, reset=True, time=40))
    expected = run(way("additive", form), inputs)
    ones = torch.ones(2, 8, dtype=torch.float64)
    actual = run(way("additive", form), inputs | {"bonus": ones})
    del actual["grad bonus"]
    expected.pop("grad log_decay", None)
    actual.pop("grad log_decay", None)  # other tokens' decays count in each kind of read
    assert_close(actual, expected, torch.float64)


@every_way_of_recurrences
@pytest.mark.parametrize("name", ["normalize_mixed", "normalize_bonus_head"])
def test_the_normaliser_is_a_column_of_ones(form, name):
    inputs = make_inputs("additive", replace(CASES[name], time=40))

    def by_hand(*, normalize, v, eps=1e-6, **rest):
        assert normalize
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        o, state = way("additive", form)(v=v, **rest)
        return o[..., :-1] / (o[..., -1:] + eps), state

    expected = run(by_hand, inputs)
    assert_close(run(way("additive", form), inputs), expected, torch.float64)


@every_way("additive", "delta")
def test_scale_multiplies_the_queries(op, form):
    inputs = make_inputs(op, Case(decay="weak", state=True, scale=-0.3))
    o, state = way(op, form)(**inputs)
    expected, same = way(op, form)(**inputs | {"q": -0.3 * inputs["q"], "scale": 1.0})
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, same)


@pytest.mark.parametrize(
    "name",
    [name for name, case in CASES.items() if case.applies_to("wkv4")],
)
def test_wkv4_is_its_formula(name):
    """Every token's logits written out: what it sees, how long ago, and the largest of them."""
    case = replace(CASES[name], time=9)
    x, o, final_state = scalars("wkv4", case)
    for b, d in np.ndindex(case.batch, case.key_dim):
        w, u = x["log_decay"][d], x["bonus"][d]
        old = [part[b, d].item() for part in x["initial_state"]] if case.state else (0.0, 0.0, 0.0)
        logits, values, weights = [old[2]], [old[0]], [old[1]]
        for t in range(case.time):
            k, v = x["k"][b, t, d], x["v"][b, t, d]
            if case.reset and x["reset"][b, t]:
                logits, values, weights = [0.0], [0.0], [0.0]
            seen = np.exp(np.append(logits, k + u))
            mean = seen @ np.append(values, v) / (seen @ np.append(weights, 1.0))
            np.testing.assert_allclose(o[b, t, d], mean, rtol=1e-9)
            logits = [*(w + np.array(logits)), k]
            values, weights = [*values, v], [*weights, 1.0]
        counts = np.array(weights) != 0  # an empty state has no logit
        largest = np.max(np.array(logits)[counts])
        factor = np.exp(np.array(logits) - largest)
        expected = (factor @ values, factor @ weights, largest)
        np.testing.assert_allclose([part[b, d] for part in final_state], expected, rtol=1e-9)


@every_way_of_recurrences
def test_wkv4_without_decay_and_bonus_is_a_running_softmax_over_the_keys(form):
    inputs = make_inputs("wkv4", Case(decay="zero", time=40)) | {
        "bonus": torch.zeros(8, dtype=torch.float64)
    }
    k, v = inputs["k"], inputs["v"]
    o, state = way("wkv4", form)(**inputs)
    for t in range(40):
        mean = (k[:, : t + 1].softmax(dim=1) * v[:, : t + 1]).sum(dim=1)
        torch.testing.assert_close(o[:, t], mean)
    torch.testing.assert_close(state.max, k.amax(dim=1))
    torch.testing.assert_close(state.max + state.den.log(), k.logsumexp(dim=1))
    torch.testing.assert_close(state.num / state.den, o[:, -1])


@every_way_of_recurrences
def test_wkv4_that_forgets_at_once_sees_itself_and_the_token_before(form):
    inputs = make_inputs("wkv4", Case(decay="wiped", time=40))
    k, v, u = inputs["k"], inputs["v"], inputs["bonus"]
    own = torch.sigmoid(u + k - torch.cat([torch.full_like(k[:, :1], -torch.inf), k[:, :-1]], 1))
    expected = own * v + (1 - own) * torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], dim=1)
    o, state = way("wkv4", form)(**inputs)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state.num, v[:, -1])
    torch.testing.assert_close(state.max, k[:, -1])


@every_way_of_recurrences
def test_a_state_of_wkv4_counts_by_its_weights_whatever_their_common_factor(form):
    """The same weights with another factor: equal outputs, and a state with the same weights."""
    inputs = make_inputs("wkv4", Case(state=True, time=40))
    num, den, largest = inputs["initial_state"]
    heavy = WKV4State(num * math.exp(9), den * math.exp(9), largest - 9 + 500)
    inputs = inputs | {"initial_state": WKV4State(num, den, largest + 500)}
    o, state = way("wkv4", form)(**inputs)
    same, told_otherwise = way("wkv4", form)(**inputs | {"initial_state": heavy})
    torch.testing.assert_close(same, o)
    for part in (0, 1):
        torch.testing.assert_close(told_otherwise[part] / math.exp(9), state[part])
    torch.testing.assert_close(told_otherwise.max, state.max - 9)


@every_way_of_recurrences
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shift", [500.0, -500.0])
def test_wkv4_counts_only_differences_of_keys(form, shift, dtype):
    """Keys far from zero change the largest logit and nothing else."""
    inputs = make_inputs("wkv4", Case(state=True, reset=True, time=40), dtype)
    rounded = (inputs["k"] * 1024).round() / 1024  # so that float32 holds the shifted ones too
    num, den, largest = inputs["initial_state"]
    largest = (largest * 1024).round() / 1024

    def at(distance, precision):
        state = WKV4State(num, den, largest + distance)
        shifted = inputs | {"k": rounded + distance, "initial_state": state}
        return {n: map_tensors(lambda x: to(x, precision), x) for n, x in shifted.items()}

    def to(x, precision):
        return x.to(precision) if x.is_floating_point() else x

    expected = run(OPS["wkv4"].recurrent, at(0.0, torch.float64))
    expected["final_state.max"] += shift
    assert_close(run(way("wkv4", form), at(shift, dtype)), expected, dtype)


@every_way_of_recurrences
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["mixed", "infinite", "wide"])
def test_keys_of_any_size_do_not_overflow_wkv4(form, decay, dtype):
    def enlarged(precision):
        inputs = make_inputs("wkv4", Case(decay=decay, reset=True, time=40), precision)
        return inputs | {"k": (300 * inputs["k"]).clamp(-500, 500), "bonus": 90 * inputs["bonus"]}

    expected = run(OPS["wkv4"].recurrent, enlarged(torch.float64))
    assert_close(run(way("wkv4", form), enlarged(dtype)), expected, dtype)
