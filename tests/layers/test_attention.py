"""Attention with any score, and the scores whose state has a constant size."""

from itertools import pairwise

import pytest
import torch
from model_helpers import (
    FORMS,
    TOLERANCE,
    assert_all_close,
    assert_close,
    random_model,
    random_tokens,
    resets_at,
    small_config,
    with_gradients,
)

from model.layers.attention import AttentionState, ConstantState
from model.layers.feature_maps import monomials, num_monomials, num_taylor, taylor
from model.layers.layer import Context
from model.layers.rotary import document_positions
from model.ops import OPS
from model.ops.scores import SCORES, by_rows
from model.presets import parse_mixer
from model.state import concatenate, num_bytes, select_rows

TIME = 70
RESETS = [(0, 0), (0, 33), (1, 5), (1, 6), (1, 64), (1, TIME - 1)]
CONSTANT = (
    "square_l1",
    "square_l1:sum_eps=0.5",
    "taylor",
    "polynomial:1",
    "polynomial:2",
    "polynomial:3",
)
FEATURES = {"square_l1": 36, "taylor": 45, "polynomial:1": 8, "polynomial:2": 36}
"""Of heads of 8 channels."""

exact_scores = pytest.mark.parametrize("score", CONSTANT)
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def attention(score, dtype=torch.float64, **changes):
    """A random model; the same weights whatever the score.

    Draw 0 has a sum of squares near zero, which square_l1 divides by: all forms lose digits there.
    """
    _, options = parse_mixer(f"attention:{score}")
    config = small_config("attention", options=options, num_layers=2, **changes)
    return random_model(config, dtype=dtype, seed=1)


def logits_and_gradients(model, tokens, form, reset=None, cuts=()):
    """Logits and the gradients of all parameters under a random cotangent; no states."""
    state, logits = None, []
    for begin, end in pairwise([0, *cuts, tokens.shape[1]]):
        part = None if reset is None else reset[:, begin:end]
        output = model(tokens[:, begin:end], state, form=form, reset=part)
        logits.append(output.logits)
        state = output.state
    joined = torch.cat(logits, dim=1)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(joined.shape, generator=generator).to(joined.dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(joined, parameters, cotangent)
    found = {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}
    return {"logits": joined.detach(), **found}


@exact_scores
@forms
@dtypes
def test_a_constant_state_does_what_the_cache_does(score, form, dtype):
    """Logits and all gradients, whole and cut with the state carried, across documents."""
    tokens, reset = random_tokens(2, TIME), resets_at(2, TIME, RESETS)
    expected = logits_and_gradients(attention(score), tokens, "recurrent", reset)
    expected = {name: x.to(dtype) for name, x in expected.items()}
    model = attention(f"{score}:constant", dtype)
    for cuts in ((), (1, 40)):
        found = logits_and_gradients(model, tokens, form, reset, cuts)
        assert_all_close(found, expected, TOLERANCE[dtype])


@exact_scores
@forms
def test_a_constant_state_is_the_same_in_all_forms(score, form):
    model = attention(f"{score}:constant")
    tokens, reset = random_tokens(2, TIME), resets_at(2, TIME, RESETS)
    with torch.no_grad():
        carried = model(random_tokens(2, 7, seed=5)).state
    expected = with_gradients(model, tokens, "recurrent", carried, reset)
    found = with_gradients(model, tokens, form, carried, reset, pieces=[13, 14])
    assert_all_close(found, expected, 1e-9)


@pytest.mark.parametrize("score", FEATURES)
@torch.no_grad()
def test_a_constant_state_does_not_grow(score):
    model = attention(f"{score}:constant", torch.float32)
    start = model.initial_state(2)
    after = model(random_tokens(2, TIME), start).state
    assert num_bytes(after) == num_bytes(start)
    state = after[0].time
    assert isinstance(state, ConstantState)
    assert state.matrix.shape == (2, 4, FEATURES[score], 8 + (score[:4] != "poly"))
    wide = score == "square_l1"  # whose sum of weights can come near zero
    assert state.matrix.dtype == (torch.float64 if wide else torch.float32)


@torch.no_grad()
def test_single_precision_survives_a_sum_of_weights_near_zero():
    """A first key nearly orthogonal to its query: the products of the features cancel."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 1, 1, 4, 8, generator=generator)
    along = (q * k).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True)
    k = 30 * (k - q * along) + 1e-3 * q
    exact, _ = OPS["attention"].recurrent(
        *(x.double() for x in (q, k, v)), score="square_l1", scale=8**-0.5
    )
    layer = attention("square_l1:constant", torch.float32).blocks[0].time_mix
    empty, length = layer.initial_state(1).matrix, torch.ones(1, 1)
    found, _ = layer._read_constant(q, k, v, length, empty, Context("recurrent"))
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, 1e-5)


@pytest.mark.parametrize("score", sorted(SCORES))
def test_every_score_makes_a_model(score):
    """Forms agree, and a sequence may be cut, through a whole network with rotary positions."""
    model = attention(score)
    tokens, reset = random_tokens(2, 21), resets_at(2, 21, [(0, 9), (1, 1), (1, 20)])
    expected = with_gradients(model, tokens, "recurrent", reset=reset)
    for form in ("parallel", "chunked"):
        found = with_gradients(model, tokens, form, reset=reset, pieces=[6, 7])
        assert_all_close(found, expected, 1e-9)
    assert all(x.any() for name, x in expected.items() if name.startswith("gradient"))


@pytest.mark.parametrize("score", ["softmax", "tanh", "polynomial:2:constant"])
@forms
@torch.no_grad()
def test_the_position_counts_from_the_start_of_a_document(score, form):
    model = attention(score)
    reset = resets_at(3, 12, [(0, 4), (0, 7), (1, 11)])
    first = model(random_tokens(3, 12), form=form, reset=reset).state
    assert first[1].time.position.tolist() == [5, 1, 12]
    second = model(random_tokens(3, 2), first, form=form, reset=resets_at(3, 2, [(1, 1)])).state
    assert second[1].time.position.tolist() == [7, 1, 14]


def test_document_positions_one_by_one():
    before, reset = torch.tensor([0, 3]), resets_at(2, 6, [(0, 0), (0, 4), (1, 2)])
    found = document_positions(before, 6, reset)
    assert found.tolist() == [[0, 1, 2, 3, 0, 1], [3, 4, 0, 1, 2, 3]]
    assert document_positions(before, 2, None).tolist() == [[0, 1], [3, 4]]


@pytest.mark.parametrize("score", ["sigmoid", "square_l1:constant"])
@torch.no_grad()
def test_rows_of_different_lengths_continue_together(score):
    model = attention(score)
    states = [model(random_tokens(1, time, seed=time)).state for time in (4, 9)]
    more = random_tokens(2, 5, seed=3)
    together = model(more, concatenate(states))
    for row, state in enumerate(states):
        alone = model(more[row : row + 1], state)
        assert_close(together.logits[row : row + 1], alone.logits, 1e-9)
    kinds = {type(block.time) for block in select_rows(together.state, [1])}
    assert kinds == {ConstantState if "constant" in score else AttentionState}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_monomials_make_a_power_of_a_dot_product(order):
    x, y = torch.randn(2, 5, 7, dtype=torch.float64)
    phi_x, phi_y = monomials(x, order), monomials(y, order)
    assert phi_x.shape == (5, num_monomials(7, order))
    assert_close((phi_x * phi_y).sum(-1), (x * y).sum(-1) ** order, 1e-12)
    assert [num_monomials(7, p) for p in (1, 2, 3)] == [7, 7 * 8 // 2, 7 * 8 * 9 // 6]
    assert monomials(x.float(), order).dtype == torch.float32


def test_monomials_by_hand():
    a, b = 3.0, 5.0
    x = torch.tensor([a, b], dtype=torch.float64)
    root = 2**0.5
    expected = torch.tensor([a * a, root * a * b, b * b], dtype=torch.float64)
    assert_close(monomials(x, 2), expected, 1e-12)
    root = 3**0.5
    expected = torch.tensor([a**3, root * a * a * b, root * a * b * b, b**3], dtype=torch.float64)
    assert_close(monomials(x, 3), expected, 1e-12)


def test_taylor_features_make_the_second_order_of_exp():
    x, y = torch.randn(2, 5, 7, dtype=torch.float64)
    s = (x * y).sum(-1)
    assert_close((taylor(x) * taylor(y)).sum(-1), 1 + s + s**2 / 2, 1e-12)
    assert taylor(x).shape == (5, num_taylor(7))
    assert num_taylor(7) == 1 + 7 + 28


def test_a_users_score_is_a_mixer_like_the_others(monkeypatch):
    """A row of its own: by name, in all forms, with documents, split, and as the table's relu."""
    monkeypatch.setitem(SCORES, "mine", by_rows(lambda s: s.relu() / s.shape[-1]))
    model, tokens = attention("mine"), random_tokens(2, TIME)
    reset = resets_at(2, TIME, RESETS)
    expected = with_gradients(attention("relu"), tokens, "recurrent", reset=reset)
    for form, cuts in (("parallel", ()), ("chunked", (20, 21)), ("recurrent", ())):
        actual = with_gradients(model, tokens, form, reset=reset, pieces=cuts)
        assert_all_close(actual, expected, 1e-9)
