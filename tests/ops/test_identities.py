"""The recurrent forms against the formulas written out, and what the ops reduce to."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CASES, Case, assert_close, make_inputs, run
from torch import Tensor

from model.ops import FORMS, OPS

every_form = pytest.mark.parametrize("form", FORMS)


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


@every_form
@pytest.mark.parametrize("op", ["additive", "delta"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_decay_of_zero_is_no_decay(op, form, per_channel):
    case = Case(decay="zero", per_channel=per_channel, state=True, reset=True, time=40)
    inputs = make_inputs(op, case)
    actual = run(OPS[op].form(form), inputs)
    del actual["grad log_decay"], inputs["log_decay"]
    assert_close(actual, run(OPS[op].form(form), inputs), torch.float64)


@every_form
@pytest.mark.parametrize("op", ["additive", "delta"])
def test_a_decay_for_each_head_is_one_for_all_its_channels(op, form):
    inputs = make_inputs(op, Case(decay="weak", per_channel=False, state=True, time=40))
    expected = run(OPS[op].form(form), inputs)

    def broadcast(*, log_decay, **rest):
        return OPS[op].form(form)(log_decay=log_decay[..., None].expand_as(rest["k"]), **rest)

    assert_close(run(broadcast, inputs), expected, torch.float64)


@every_form
@pytest.mark.parametrize("name", ["state", "head_mixed_reset", "infinite_reset"])
def test_delta_that_removes_nothing_is_additive(form, name):
    inputs = make_inputs("additive", replace(CASES[name], time=40))

    def delta(**rest):
        nothing = torch.zeros_like(rest["k"])
        return OPS["delta"].form(form)(a=nothing, b=nothing, **rest)

    assert_close(run(delta, inputs), run(OPS["additive"].recurrent, inputs), torch.float64)


@every_form
@pytest.mark.parametrize("decay", [None, "zero"])
def test_a_bonus_of_one_without_decay_reads_after_the_write(form, decay):
    inputs = make_inputs("additive", Case(decay=decay, state=True, reset=True, time=40))
    expected = run(OPS["additive"].form(form), inputs)
    ones = torch.ones(2, 8, dtype=torch.float64)
    actual = run(OPS["additive"].form(form), inputs | {"bonus": ones})
    del actual["grad bonus"]
    expected.pop("grad log_decay", None)
    actual.pop("grad log_decay", None)  # other tokens' decays count in each kind of read
    assert_close(actual, expected, torch.float64)


@every_form
@pytest.mark.parametrize("name", ["normalize_mixed", "normalize_bonus_head"])
def test_the_normaliser_is_a_column_of_ones(form, name):
    inputs = make_inputs("additive", replace(CASES[name], time=40))

    def by_hand(*, normalize, v, eps=1e-6, **rest):
        assert normalize
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        o, state = OPS["additive"].form(form)(v=v, **rest)
        return o[..., :-1] / (o[..., -1:] + eps), state

    expected = run(by_hand, inputs)
    assert_close(run(OPS["additive"].form(form), inputs), expected, torch.float64)


@every_form
@pytest.mark.parametrize("op", ["additive", "delta"])
def test_scale_multiplies_the_queries(op, form):
    inputs = make_inputs(op, Case(decay="weak", state=True, scale=-0.3))
    o, state = OPS[op].form(form)(**inputs)
    expected, same = OPS[op].form(form)(**inputs | {"q": -0.3 * inputs["q"], "scale": 1.0})
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, same)
