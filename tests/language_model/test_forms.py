"""Parallel, chunked and recurrent are one function, and a sequence may be cut anywhere."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import (
    ALL_MIXERS,
    FORMS,
    TOLERANCE,
    assert_all_close,
    assert_close,
    assert_states_close,
    random_model,
    random_tokens,
    resets_at,
    same_bits,
    small_config,
    with_gradients,
)

from model.layers import MIXERS
from model.ops import FORMS as FORMS_OF_THE_OPS
from model.state import clone, detach, map_tensors

TIME = 70
"""More than one chunk of every op, and no multiple of its length."""
RESETS = [(0, 0), (0, 33), (1, 5), (1, 6), (1, 64), (1, TIME - 1)]

mixers = pytest.mark.parametrize("mixer", ALL_MIXERS)
forms = pytest.mark.parametrize("form", FORMS)
with_and_without_reset = pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])


def test_forms_are_those_of_the_ops():
    assert FORMS == FORMS_OF_THE_OPS


@mixers
@with_and_without_reset
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forms_agree_in_logits_state_and_gradients(mixer, dtype, with_reset):
    model = random_model(small_config(mixer, calm=dtype == torch.float32), dtype=dtype)
    tokens = random_tokens(2, TIME)
    reset = resets_at(2, TIME, RESETS) if with_reset else None
    carried = detach(model(random_tokens(2, 7, seed=5)).state)
    expected = with_gradients(model, tokens, "recurrent", carried, reset)
    for form in ("parallel", "chunked"):
        found = with_gradients(model, tokens, form, carried, reset)
        assert_all_close(found, expected, TOLERANCE[dtype])


@mixers
@with_and_without_reset
def test_single_precision_stays_near_double(mixer, with_reset):
    """Against the float64 definition, so that an error all forms share would show."""
    config, tokens = small_config(mixer, calm=True), random_tokens(2, TIME)
    reset = resets_at(2, TIME, RESETS) if with_reset else None
    expected = random_model(config)(tokens, form="recurrent", reset=reset).logits
    model = random_model(config, dtype=torch.float32)
    for form in FORMS:
        logits = model(tokens, form=form, reset=reset).logits
        assert_close(logits.double(), expected, TOLERANCE[torch.float32], form)


@mixers
@settings(max_examples=10)
@given(data=st.data())
def test_a_sequence_may_be_cut_anywhere(mixer, data):
    model = random_model(small_config(mixer))
    time = data.draw(st.integers(2, TIME), label="time")
    cuts = data.draw(st.sets(st.integers(1, time - 1), min_size=1, max_size=4), label="cuts")
    places = st.tuples(st.integers(0, 1), st.integers(0, time - 1))
    resets = data.draw(st.none() | st.sets(places, max_size=5), label="resets")
    form = data.draw(st.sampled_from(FORMS), label="form")
    tokens = random_tokens(2, time)
    reset = None if resets is None else resets_at(2, time, resets)
    expected = with_gradients(model, tokens, "chunked", reset=reset)
    found = with_gradients(model, tokens, form, reset=reset, pieces=cuts)
    assert_all_close(found, expected, TOLERANCE[torch.float64])


@mixers
@with_and_without_reset
@forms
@torch.no_grad()
def test_token_by_token_equals_whole(mixer, form, with_reset):
    model = random_model(small_config(mixer))
    tokens = random_tokens(2, 24)
    reset = resets_at(2, 24, [(0, 9), (1, 1), (1, 22)]) if with_reset else None
    whole = model(tokens, reset=reset)
    state, logits = None, []
    for t in range(tokens.shape[1]):
        now = None if reset is None else reset[:, t : t + 1]
        output = model(tokens[:, t : t + 1], state, form=form, reset=now)
        logits.append(output.logits)
        state = output.state
    assert_close(torch.cat(logits, dim=1), whole.logits, 1e-9)
    assert_states_close(state, whole.state, 1e-9)


@mixers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_chunked_prefill_then_recurrent_steps_equal_whole(mixer, dtype):
    model = random_model(small_config(mixer, calm=dtype == torch.float32), dtype=dtype)
    tokens = random_tokens(3, TIME)
    whole = model(tokens, form="recurrent")
    logits, state = model(tokens[:, :65], form="chunked")
    pieces = [logits]
    for t in range(65, TIME):
        logits, state = model(tokens[:, t : t + 1], state, form="recurrent")
        pieces.append(logits)
    assert_close(torch.cat(pieces, dim=1), whole.logits, TOLERANCE[dtype])
    assert_states_close(state, whole.state, TOLERANCE[dtype])


@mixers
@forms
@torch.no_grad()
def test_reset_equals_documents_run_apart(mixer, form):
    """Through a state carried in, too: the first document here goes on from an earlier call."""
    model = random_model(small_config(mixer))
    tokens, bounds = random_tokens(1, TIME), [0, 17, 18, 51, TIME]
    before = model(random_tokens(1, 11, seed=9)).state
    reset = resets_at(1, TIME, [(0, place) for place in bounds[1:-1]])
    packed = model(tokens, before, form=form, reset=reset)
    apart, state = [], before
    for begin, end in pairwise(bounds):
        logits, state = model(tokens[:, begin:end], state if begin == 0 else None, form=form)
        apart.append(logits)
    assert_close(packed.logits, torch.cat(apart, dim=1), 1e-9)
    following = random_tokens(1, 20, seed=3)  # a KV cache keeps what it hides: compare its effect
    assert_close(
        model(following, packed.state, form=form).logits,
        model(following, state, form=form).logits,
        1e-9,
    )
    if MIXERS[mixer].op != "attention":
        assert_states_close(packed.state, state, 1e-9)
    unpacked = model(tokens, before, form=form)
    assert (unpacked.logits - packed.logits)[:, 17:].abs().max() > 1e-3, "resets do nothing"


@mixers
@forms
@torch.no_grad()
def test_the_future_does_not_change_the_past(mixer, form):
    model = random_model(small_config(mixer))
    tokens = random_tokens(2, TIME)
    changed = tokens.clone()
    changed[:, 37] = (changed[:, 37] + 1) % model.config.vocab_size
    before, after = (model(x, form=form).logits for x in (tokens, changed))
    assert_close(after[:, :37], before[:, :37], 1e-12)
    moved = (after - before)[:, 37:].abs().amax(dim=(0, 2))
    assert (moved > 0).all(), "every later token depends on it"
    assert moved[0] > 1e-3


@mixers
@forms
@torch.no_grad()
def test_rows_do_not_touch_each_other(mixer, form):
    """One row's state is NaN; the others must not notice, and equal their runs alone."""
    model = random_model(small_config(mixer))
    tokens = random_tokens(3, 40)
    carried = model(random_tokens(3, 6, seed=2)).state

    def poison(tensor):
        tensor = tensor.clone()
        if tensor.is_floating_point():
            tensor[1] = torch.nan
        return tensor

    logits = model(tokens, map_tensors(poison, carried), form=form).logits
    assert logits[1].isnan().all()
    for row in (0, 2):
        own = map_tensors(lambda x, row=row: x[row : row + 1], carried)
        alone = model(tokens[row : row + 1], own, form=form).logits
        assert_close(logits[row : row + 1], alone, 1e-9)


@mixers
@forms
@pytest.mark.parametrize("grad", [False, True])
def test_the_state_passed_in_is_never_changed(mixer, form, grad):
    model = random_model(small_config(mixer))
    state = model(random_tokens(2, 9)).state
    kept = clone(state)
    with torch.set_grad_enabled(grad):
        for time in (1, 33):
            tokens = random_tokens(2, time, seed=time)
            model(tokens, state, form=form)
            assert same_bits(state, kept)
            reset = resets_at(2, time, [(0, 0), (1, time - 1)])
            model(tokens, state, form=form, reset=reset)
            assert same_bits(state, kept)


@mixers
def test_every_parameter_receives_a_gradient(mixer):
    """Of the logits alone, each entry of it: nothing is built that takes no part."""
    model = random_model(small_config(mixer))
    tokens = random_tokens(4, TIME)
    logits = model(tokens).logits
    (
        logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    ).sum().backward()
    assert len(set(tokens.flatten().tolist())) == model.config.vocab_size
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).all(), name


@mixers
def test_one_head_one_layer_and_one_token(mixer):
    """The smallest network, and the shortest sequence."""
    model = random_model(small_config(mixer, num_layers=1, d_model=8))
    first, tokens = random_tokens(1, 1), random_tokens(1, 5)
    expected = model(first, form="recurrent")
    for form in ("parallel", "chunked"):
        found = model(first, form=form)
        assert_close(found.logits, expected.logits, 1e-9)
        assert_states_close(found.state, expected.state, 1e-9)
        assert_all_close(
            with_gradients(model, tokens, form), with_gradients(model, tokens, "recurrent"), 1e-9
        )


@mixers
def test_wrong_calls_are_refused(mixer):
    model = random_model(small_config(mixer))
    with pytest.raises(ValueError, match="form must be one of parallel, chunked, recurrent"):
        model(random_tokens(1, 3), form="sequential")
    for tokens in (torch.zeros(3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with T >= 1"):
            model(tokens)


@mixers
@torch.no_grad()
def test_features_are_what_the_head_reads(mixer):
    model = random_model(small_config(mixer))
    tokens = random_tokens(2, 12)
    features, state = model.features(tokens)
    logits, expected_state = model(tokens)
    assert features.shape == (2, 12, model.config.d_model)
    assert torch.equal(model.head(features), logits)
    assert same_bits(state, expected_state)
