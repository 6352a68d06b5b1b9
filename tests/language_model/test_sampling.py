"""What is drawn from logits."""

import pytest
import torch
from generation_helpers import BOLD, GREEDY, seeds
from model_helpers import (
    VOCAB,
)

from model.sampling import Sampling, sample


def draws(logits, sampling, count, seen=None):
    """`[count]` tokens drawn one after the other from one row of logits."""
    seen = None if seen is None else seen.expand(count, -1)
    return sample(logits.expand(count, -1), sampling, seeds(0) * count, seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": float("inf")}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"temperature": 0, "top_k": 3}, "top_k has no effect at temperature 0"),
        ({"temperature": 0, "min_p": 0.1}, "min_p has no effect at temperature 0"),
    ],
)
def test_settings_that_cannot_be_drawn_with_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    count = 20_000
    drawn = draws(logits, Sampling(temperature=temperature), count)
    expected = (logits[0].double() / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=5) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4 * deviation).all()
    assert found[4] == 0


def test_temperature_0_takes_the_likeliest_and_a_tiny_one_does_too():
    logits = torch.randn(7, VOCAB)
    assert torch.equal(sample(logits, GREEDY, seeds(*range(7))), logits.argmax(-1))
    tiny = sample(logits, Sampling(temperature=1e-60), seeds(*range(7)))
    assert torch.equal(tiny, logits.argmax(-1))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=1), {3}),
        (Sampling(top_k=2), {3, 0}),
        (Sampling(top_k=100), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.3), {3}),
        (Sampling(top_p=0.41), {3, 0}),
        (Sampling(top_p=0.66), {3, 0}),
        (Sampling(top_p=0.75), {3, 0, 1}),
        (Sampling(top_p=1.0), {0, 1, 2, 3, 4}),
        (Sampling(min_p=0.0), {0, 1, 2, 3, 4}),
        (Sampling(min_p=0.3), {3, 0, 1}),
        (Sampling(min_p=1.0), {3}),
        (Sampling(top_k=2, top_p=0.5), {3}),  # 0.4 of the 0.7 that top_k left
        (Sampling(top_p=0.75, min_p=0.6), {3, 0}),
        (Sampling(temperature=0.25, min_p=0.3), {3, 0}),  # the temperature comes first
    ],
)
def test_what_is_left_to_draw_from(sampling, kept):
    logits = torch.tensor([[0.3, 0.15, 0.1, 0.4, 0.05]]).log()
    assert set(draws(logits, sampling, 500).tolist()) == kept


def test_equal_logits_do_not_make_top_k_or_top_p_keep_more():
    flat = torch.zeros(1, 10)
    assert len(set(draws(flat, Sampling(top_k=3), 300).tolist())) == 3
    assert len(set(draws(flat, Sampling(top_p=0.25), 300).tolist())) == 3


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[3.0, 2.0, -1.0, -1.5]])
    sampling = Sampling(2.0, temperature=0)
    for seen, best in [([], 0), ([0], 1), ([0, 1], 0), ([3], 0)]:
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[0, seen] = True
        assert sample(logits, sampling, seeds(0), mask).item() == best
    negative = torch.tensor([[-1.0, -1.5]])
    mask = torch.tensor([[True, False]])
    assert sample(negative, sampling, seeds(0), mask).item() == 1
    with pytest.raises(ValueError, match="needs `seen`"):
        sample(logits, sampling, seeds(0))


def test_logits_are_not_changed_and_must_be_numbers():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    sample(logits, BOLD, seeds(1, 2), torch.ones(2, VOCAB, dtype=torch.bool))
    assert torch.equal(logits, before)
    for broken in (torch.nan, torch.inf):
        logits[1, 3] = broken
        for sampling in (Sampling(), GREEDY):
            with pytest.raises(ValueError, match="not finite"):
                sample(logits, sampling, seeds(1, 2))
