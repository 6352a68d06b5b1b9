"""The KV cache: caches of different lengths in one batch, and what it keeps."""

from dataclasses import replace

import pytest
import torch
from helpers import CASES, TIMED, Case, assert_close, in_pieces, make_inputs, map_tensors, run

from model.ops import FORMS, OPS
from model.ops.attention import KVCache, parallel_attention

every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_rows_of_different_lengths_continue_as_one_batch(form):
    attention = OPS["attention"].form(form)
    prompts = [
        make_inputs("attention", Case(batch=1, time=time, seed=time, scale=0.35, reset=time > 5))
        for time in (3, 11, 1)
    ]
    more = make_inputs("attention", replace(CASES["reset"], batch=3, time=6, scale=0.35))
    caches = [attention(**prompt)[1] for prompt in prompts]
    joined = KVCache.concatenate(caches)
    assert joined.key.shape == (3, 11, 2, 8)
    assert joined.value.shape == (3, 11, 2, 12)
    assert joined.start.tolist() == [8, int(caches[1].start), 10]
    assert caches[1].start > 0

    together = run(attention, more | {"initial_state": joined})
    for row, cache in enumerate(caches):
        alone = {n: x[row : row + 1] if n in TIMED else x for n, x in more.items()}
        o, state = attention(**alone, initial_state=cache)
        missing = 11 - cache.key.shape[1]
        expected = {
            "o": o,
            "final_state.key": state.key,
            "final_state.start": state.start + missing,
        }
        actual = {n: together[n][row : row + 1] for n in expected}
        actual["final_state.key"] = actual["final_state.key"][:, missing:]
        assert_close(actual, expected, torch.float64)
        for name in ("key", "value"):  # of outputs alone; cotangents of the cache would hide it
            hidden = gradient_of_outputs(attention, more, joined)[name][row, : joined.start[row]]
            assert not hidden.any()


def gradient_of_outputs(attention, inputs, cache):
    """Gradient of the summed squares of the outputs with respect to the cache."""
    leaves = map_tensors(lambda x: x.clone().requires_grad_(x.is_floating_point()), cache)
    o, _ = attention(**inputs, initial_state=leaves)
    key, value = torch.autograd.grad(o.square().sum(), [leaves.key, leaves.value])
    return {"key": key, "value": value}


@every_form
def test_steps_from_an_empty_cache_equal_the_whole(form):
    inputs = make_inputs("attention", replace(CASES["reset"], time=7))
    expected = run(parallel_attention, inputs)
    empty = KVCache.empty(inputs["k"], inputs["v"])
    assert empty.key.shape == (2, 0, 2, 8)
    assert empty.value.shape == (2, 0, 2, 12)

    def steps(**arguments):
        return in_pieces(OPS["attention"].form(form), *range(1, 7))(
            **arguments, initial_state=empty
        )

    assert_close(run(steps, inputs), expected, torch.float64)


@every_form
@pytest.mark.parametrize("scale", [-2.0, 0.0, 3.0])
def test_any_scale_gives_weights(form, scale):
    inputs = make_inputs("attention", Case(scale=scale))
    o, _ = OPS["attention"].form(form)(**inputs | {"v": torch.ones_like(inputs["v"])})
    torch.testing.assert_close(o, torch.ones_like(o))


@every_form
def test_the_old_cache_is_a_branch_to_come_back_to(form):
    attention = OPS["attention"].form(form)
    inputs = make_inputs("attention", Case(state=True, time=4))
    kept = map_tensors(torch.clone, inputs["initial_state"])
    first, state = attention(**inputs)
    attention(**inputs | {"v": -inputs["v"], "initial_state": state})
    again, _ = attention(**inputs)
    assert torch.equal(first, again)
    assert all(map(torch.equal, inputs["initial_state"], kept))


def steps_from(cache, tokens, seed):
    """The caches after each of some tokens, one at a time, without gradients."""
    inputs = make_inputs("attention", Case(time=tokens, seed=seed, batch=cache.key.shape[0]))
    caches, outputs = [cache], []
    with torch.no_grad():
        for t in range(tokens):
            token = {n: x[:, t : t + 1] if n in TIMED else x for n, x in inputs.items()}
            o, new = OPS["attention"].form("chunked")(**token, initial_state=caches[-1])
            caches.append(new)
            outputs.append(o)
    return caches, torch.cat(outputs, dim=1)


def test_a_step_writes_its_token_and_copies_nothing():
    _, cache = parallel_attention(**make_inputs("attention", Case(time=3)))
    caches, _ = steps_from(cache, 200, seed=1)
    places = [c.key.untyped_storage().data_ptr() for c in caches]
    assert len(set(places[2:])) <= 4  # 64 tokens at first, then twice as many
    assert places[2] == places[20]
    assert caches[20].value.untyped_storage().data_ptr() == caches[2].value.data_ptr()


def test_branches_of_a_grown_cache_do_not_see_each_other():
    _, cache = parallel_attention(**make_inputs("attention", Case(time=3)))
    caches, _ = steps_from(cache, 30, seed=1)
    kept = [map_tensors(torch.clone, c) for c in caches]
    for start in (30, 10, 0, 30):  # the newest, an old one, one without room, the newest once more
        _, branch = steps_from(caches[start], 20, seed=2)
        _, alone = steps_from(kept[start], 20, seed=2)
        assert torch.equal(branch, alone)
    for cache, copy in zip(caches, kept, strict=True):
        assert all(map(torch.equal, cache, copy))


def test_a_token_without_gradients_does_not_disturb_a_backward_pass():
    _, cache = parallel_attention(**make_inputs("attention", Case(time=3)))
    caches, _ = steps_from(cache, 5, seed=1)
    inputs = make_inputs("attention", Case(time=1, batch=cache.key.shape[0]))
    expected, actual = (
        gradient_of_query(inputs, caches[-1], between)
        for between in (lambda: None, lambda: steps_from(caches[-1], 5, seed=3))
    )
    assert torch.equal(actual, expected)


def gradient_of_query(inputs, cache, between):
    """With something done between the forward and the backward pass."""
    query = inputs["q"].clone().requires_grad_()
    o, _ = OPS["attention"].form("chunked")(**inputs | {"q": query}, initial_state=cache)
    between()
    return torch.autograd.grad(o.square().sum(), query)[0]
