"""What stands in place of softmax: each score against its formula, and what holds for all."""

import math

import pytest
import torch
from helpers import (
    CASES,
    SCORES_TESTED,
    TIMED,
    Case,
    assert_close,
    check_form,
    make_inputs,
    run,
)

from model.ops import FORMS, OPS
from model.ops.attention import KVCache, chunked_attention, parallel_attention
from model.ops.scores import SCORES, Score, by_rows, entmax, find_score, polynomial
from model.ops.scores import over_sum as make_over_sum
from train.verify.inputs import spread

EPS = 1e-6
SCORES_OF_A_TABLE = {n: find_score(s) for n, s in SCORES_TESTED.items() if n != "user"} | {
    "softmax": SCORES["softmax"]
}

every_form = pytest.mark.parametrize("form", FORMS)
every_score = pytest.mark.parametrize("name", SCORES_OF_A_TABLE)


def threshold(s, alpha):
    """`[(alpha - 1) s - tau]_+^(1 / (alpha - 1))` with the tau that makes the sum 1."""
    low, high = (alpha - 1) * max(s) - 1, (alpha - 1) * max(s)
    for _ in range(200):
        tau = (low + high) / 2
        p = [max((alpha - 1) * x - tau, 0.0) ** (1 / (alpha - 1)) for x in s]
        low, high = (tau, high) if sum(p) > 1 else (low, tau)
    return p


def over_sum(f, s, eps=EPS):
    return [f(x) / (sum(f(y) for y in s) + eps) for x in s]


FORMULAS = {
    "softmax": lambda s, t: over_sum(math.exp, s, 0),
    "square_l1": lambda s, t: over_sum(lambda x: x * x, s),
    "relu_l1": lambda s, t: over_sum(lambda x: max(x, 0), s),
    "sigmoid_l1": lambda s, t: over_sum(lambda x: 1 / (1 + math.exp(-x)), s),
    "softplus_l1": lambda s, t: over_sum(lambda x: math.log(1 + math.exp(x)), s),
    "tanh": lambda s, t: [math.tanh(x) / math.sqrt(t) for x in s],
    "sigmoid": lambda s, t: [1 / (1 + t * math.exp(-x)) for x in s],
    "relu": lambda s, t: [max(x, 0) / t for x in s],
    "relu_squared": lambda s, t: [max(x, 0) ** 2 / t for x in s],
    "polynomial": lambda s, t: [x**3 / math.sqrt(15 * t) for x in s],
    "polynomial_1": lambda s, t: [x / math.sqrt(t) for x in s],
    "polynomial_2": lambda s, t: [x**2 / math.sqrt(3 * t) for x in s],
    "polynomial_4": lambda s, t: [x**4 / math.sqrt(105 * t) for x in s],
    "taylor": lambda s, t: over_sum(lambda x: 1 + x + x**2 / 2, s, 0),
    "entmax": lambda s, t: threshold(s, 1.5),
    "entmax_1.1": lambda s, t: threshold(s, 1.1),
    "entmax_1.3": lambda s, t: threshold(s, 1.3),
    "sparsemax": lambda s, t: threshold(s, 2),
    "softpick": lambda s, t: [
        max(math.exp(x) - 1, 0) / (sum(abs(math.exp(y) - 1) for y in s) + EPS) for x in s
    ],
}
"""One literal line a row: visible scores and their number to weights."""


def block(rows=6, places=9, scale=1.0, dtype=torch.float64):
    """Random scores `[2, 3, R, n]` and a mask `[2, 1, R, n]`: each row sees a part of its own."""
    generator = torch.Generator().manual_seed(3)
    scores = scale * torch.randn(2, 3, rows, places, generator=generator).to(dtype)
    first = torch.tensor([[0], [2]])
    own = torch.arange(rows)[None] + places - rows
    place = torch.arange(places)
    visible = (place >= first[..., None]) & (place <= own[..., None])
    return scores, visible[:, None]


@pytest.mark.parametrize("scale", [0.01, 1.0, 12.0])
@every_score
def test_weights_are_those_of_the_formula(name, scale):
    scores, visible = block(scale=scale)
    weights = SCORES_OF_A_TABLE[name](scores, visible)
    assert weights.shape == scores.shape
    for b in range(2):
        for r in range(6):
            mask = visible[b, 0, r]
            for h in range(3):
                row = scores[b, h, r, mask].tolist()
                expected = torch.tensor(FORMULAS[name](row, len(row)), dtype=torch.float64)
                found = weights[b, h, r, mask]
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
            assert (weights[b, :, r, ~mask] == 0).all()


@every_score
def test_rows_that_normalise_sum_to_one(name):
    score = SCORES_OF_A_TABLE[name]
    scores, visible = block()
    signs = torch.tensor([1.0, -1.0]).repeat(5)[:9]  # each row has scores of both signs
    sums = score((scores.abs() + 0.1) * signs, visible).sum(dim=-1)
    assert score.normalizes == torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


@every_score
def test_hidden_scores_have_no_weight_and_no_gradient(name):
    """Whatever they are: NaN and infinity too."""
    score = SCORES_OF_A_TABLE[name]
    scores, visible = block()
    generator = torch.Generator().manual_seed(4)
    cotangent = torch.randn(scores.shape, generator=generator).to(scores.dtype)
    results = []
    for value in (0.0, 1e300, torch.inf, -torch.inf, torch.nan):
        filled = scores.masked_fill(~visible, value).requires_grad_()
        weights = score(filled, visible)
        (gradient,) = torch.autograd.grad(weights, filled, cotangent)
        hidden = ~visible.expand_as(gradient)
        assert (weights[hidden] == 0).all()
        assert (gradient[hidden] == 0).all()
        results.append((weights, gradient))
    for weights, gradient in results:
        assert torch.equal(weights, results[0][0])
        assert torch.equal(gradient, results[0][1])


@every_score
def test_gradients_of_a_score_are_those_of_finite_differences(name):
    scores, visible = block(rows=3, places=5)
    score = SCORES_OF_A_TABLE[name]
    assert torch.autograd.gradcheck(lambda s: score(s, visible), scores.requires_grad_())


@pytest.mark.parametrize("name", SCORES_TESTED)
def test_gradients_of_attention_are_those_of_finite_differences(name):
    case = Case(
        score=SCORES_TESTED[name], batch=1, time=4, heads=1, key_dim=2, value_dim=2, reset=True
    )
    inputs = make_inputs("attention", case)

    def outputs(q, k, v):
        return chunked_attention(**inputs | {"q": q, "k": k, "v": v}, chunk_size=3)[0]

    assert torch.autograd.gradcheck(outputs, [inputs[n].requires_grad_() for n in "qkv"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_score
def test_large_scores_give_finite_weights_and_gradients(name, dtype):
    """A long row of scores up to 100 either way, and rows of nothing but the extremes."""
    generator = torch.Generator().manual_seed(5)
    places = 3000
    scores = (200 * torch.rand(1, 1, 6, places, generator=generator) - 100).to(dtype)
    scores[:, :, 1], scores[:, :, 2], scores[:, :, 3] = 100.0, -100.0, 0.0
    scores[:, :, 4, 1:] = -100.0
    visible = torch.ones(1, 1, 6, places, dtype=torch.bool)
    visible[..., 5, 1:] = False
    weights = SCORES_OF_A_TABLE[name](scores.requires_grad_(), visible)
    (gradient,) = torch.autograd.grad(weights, scores, torch.randn_like(weights))
    assert weights.dtype == dtype
    assert weights.isfinite().all()
    assert gradient.isfinite().all()


def test_softpick_keeps_the_digits_of_small_scores():
    scores = torch.tensor([1e-6, -3e-7, 2e-6], dtype=torch.float32)[None, None, None]
    visible = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    expected = torch.tensor(FORMULAS["softpick"](scores.double().flatten().tolist(), 3))
    found = SCORES["softpick"](scores, visible).flatten().double()
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynomial_rows_of_normal_scores_have_norm_one(order):
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(1, 1, 400, 500, generator=generator, dtype=torch.float64)
    visible = torch.ones(1, 1, 400, 500, dtype=torch.bool)
    mean = polynomial(order)(scores, visible).square().sum(dim=-1).mean()
    assert mean.item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_entmax_by_sorting_is_that_by_bisection(alpha):
    """The methods meet: an alpha next to one that is sorted gives nearly the same weights."""
    scores, visible = block()
    near = entmax(alpha - 1e-9)(scores, visible)
    torch.testing.assert_close(entmax(alpha)(scores, visible), near, rtol=0, atol=1e-7)


def test_a_row_without_a_largest_score_becomes_nan_alone():
    for name in ("entmax", "entmax_1.3", "sparsemax"):
        scores, visible = block()
        scores[0, 0, 2, 1], scores[1, 2, 5, 4] = torch.nan, torch.inf
        weights = SCORES_OF_A_TABLE[name](scores, visible)
        broken = weights.isnan().any(dim=-1)
        assert broken.nonzero().tolist() == [[0, 0, 2], [1, 2, 5]]
        assert (weights[~visible.expand_as(weights)] == 0).all()


@every_form
def test_a_function_gets_exactly_the_visible_scores(form):
    """Row by row, and the rows of the batch together that see the same places."""
    seen = []

    def weights(scores):
        seen.append(tuple(scores.shape))
        assert scores.isfinite().all()
        return scores.softmax(dim=-1)

    inputs = make_inputs("attention", Case(batch=3, time=5, scale=0.35))
    inputs["reset"] = torch.zeros(3, 5, dtype=torch.bool)
    inputs["reset"][1, 2] = True
    expected = run(parallel_attention, inputs)
    assert_close(
        run(OPS["attention"].form(form), inputs | {"score": weights}), expected, torch.float64
    )
    both = [(3, 2, n) for n in (1, 2)] + [(2, 2, n) for n in (3, 4, 5)]
    assert sorted(seen) == sorted(both + [(1, 2, n) for n in (1, 2, 3)])


@every_form
def test_a_function_of_a_row_equals_a_score_with_a_mask(form):
    def by_hand(*, score, **inputs):
        assert score == "tanh"
        return OPS["attention"].form(form)(
            **inputs, score=lambda row: row.tanh() / row.shape[-1] ** 0.5
        )

    check_form(by_hand, "attention", CASES["score_tanh"], torch.float64)


def test_a_function_may_be_wrapped_beforehand():
    inputs = make_inputs("attention", CASES["score_user"])
    expected = run(parallel_attention, inputs)
    wrapped = inputs | {"score": by_rows(spread)}
    assert_close(run(parallel_attention, wrapped), expected, torch.float64)


@every_form
@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("hard", "attention knows no score 'hard'; choose one of softmax, square_l1, "),
        (3, "attention knows no score 3; choose one of"),
        (lambda row: row.sum(-1), r"weights of the same shape of scores \[2, 2, 1\], not \[2, 2\]"),
        (lambda row: None, r"weights of the same shape of scores \[2, 2, 1\], not NoneType"),
    ],
)
def test_what_is_no_score_is_refused(form, score, message):
    with pytest.raises(ValueError, match=message):
        OPS["attention"].form(form)(**make_inputs("attention", Case()), score=score)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.inf, math.nan])
def test_sums_of_weights_need_an_eps_above_zero(eps):
    with pytest.raises(ValueError, match="the eps of relu_l1 must be above 0"):
        make_over_sum("relu_l1", eps)


def test_an_eps_stands_beside_the_sum_of_weights():
    s = torch.tensor([0.25, -0.5, 1.0], dtype=torch.float64)
    found = make_over_sum("square_l1", 0.5)(s, torch.ones(3, dtype=torch.bool))
    assert found.tolist() == pytest.approx(over_sum(lambda x: x * x, s.tolist(), 0.5), rel=1e-12)


@pytest.mark.parametrize("order", [0, 5, 2.0, True, "2"])
def test_orders_that_do_not_exist_are_refused(order):
    with pytest.raises(ValueError, match="the order of polynomial must be 1, 2, 3 or 4"):
        polynomial(order)


@pytest.mark.parametrize("alpha", [1, 0.5, 2.1, math.nan, "1.5"])
def test_alphas_out_of_range_are_refused(alpha):
    with pytest.raises(ValueError, match="the alpha of entmax must be above 1 and at most 2"):
        entmax(alpha)


def test_the_chunked_form_makes_blocks_of_rows():
    shapes = []

    def record(scores, visible):
        shapes.append((tuple(scores.shape), tuple(visible.shape)))
        return scores

    inputs = make_inputs("attention", Case(state=True, time=37))
    score = Score(record, "recorded", None, normalizes=False)
    chunked_attention(**inputs, score=score, chunk_size=16)
    assert shapes == [
        ((2, 2, rows, seen), (2, 1, rows, seen)) for rows, seen in ((16, 21), (16, 37), (5, 42))
    ]


@every_form
@pytest.mark.parametrize("score", ["sigmoid", "polynomial", "softpick"])
def test_rows_of_different_lengths_continue_as_one_batch(form, score):
    """The length of a row counts its own tokens, not what fills its cache up."""
    attention = OPS["attention"].form(form)
    cases = [Case(batch=1, time=time, seed=time, score=score) for time in (3, 9)]
    caches = [attention(**make_inputs("attention", case))[1] for case in cases]
    more = make_inputs("attention", Case(time=4, score=score))
    together, _ = attention(**more, initial_state=KVCache.concatenate(caches))
    for row, cache in enumerate(caches):
        alone = {n: x[row : row + 1] if n in TIMED else x for n, x in more.items()}
        o, _ = attention(**alone, initial_state=cache)
        torch.testing.assert_close(together[row : row + 1], o, rtol=1e-9, atol=1e-12)


def test_the_table_says_where_each_score_comes_from():
    for name, score in SCORES.items():
        assert score.source is None or score.source.startswith("arXiv "), name
    assert {n for n, s in SCORES.items() if s.exact} == {"square_l1", "polynomial", "taylor"}
    assert [polynomial(order).exact for order in (1, 2, 3, 4)] == [True, True, True, False]
