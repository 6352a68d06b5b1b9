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
