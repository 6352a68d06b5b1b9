"""The learning rate over the steps, and each parameter group's share of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import RATES, small_config

from model.language_model import LanguageModel
from model.layers import MIXERS
from train.budget import Budget
from train.optimizer import make_optimizer, set_rate
from train.recipes import recipe_of
from train.schedule import SCHEDULES, rate_factor


@given(
    steps=st.integers(1, 500),
    warmup=st.integers(0, 600),
    final=st.floats(0.01, 1.0),
    schedule=st.sampled_from(SCHEDULES),
)
def test_rate_rises_to_the_peak_and_falls_towards_the_end(steps, warmup, final, schedule):
    settings = {"steps": steps, "warmup": warmup, "final_fraction": final, "schedule": schedule}
    factors = [rate_factor(step, **settings) for step in range(steps)]
    rising, falling = factors[:warmup], factors[warmup:]
    assert all(0 < factor <= 1 for factor in factors)
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if rising:
        assert rising[0] == pytest.approx(1 / (warmup + 1))
        assert max(rising) < 1
    if falling:
        assert falling[0] == 1
        assert min(falling) >= final
    end = rate_factor(max(steps, warmup + 1), **settings)
    assert end == pytest.approx(final)


def test_cosine_is_half_way_in_the_middle():
    assert rate_factor(60, steps=110, warmup=10, final_fraction=0.2) == pytest.approx(0.6)


def test_stable_rate_falls_over_the_last_fifth_along_a_root():
    settings = {"steps": 100, "warmup": 5, "final_fraction": 0.0, "schedule": "wsd"}
    factors = [rate_factor(step, **settings) for step in range(100)]
    assert factors[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert factors[5:81] == [1.0] * 76
    assert factors[85] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 - 0.95**0.5)
    halfway = rate_factor(85, **{**settings, "final_fraction": 0.2})
    assert halfway == pytest.approx(0.2 + 0.8 * 0.5)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_group_keeps_its_share_of_the_rate(mixer):
    model = LanguageModel(small_config(mixer))
    optimizer = make_optimizer(model, recipe_of(mixer), 3e-3, 0.1)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert set(scales) == {1.0, *RATES.get(mixer, {}).values()}
    for rate in (3e-3, 7e-4):
        set_rate(optimizer, rate)
        assert [g["lr"] for g in optimizer.param_groups] == [rate * scale for scale in scales]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_group_moves_by_its_share():
    """Adam's first step is the rate itself, whatever the gradient."""
    model = LanguageModel(small_config("rwkv7"))
    optimizer = make_optimizer(model, recipe_of("rwkv7"), 1.0, 0.0)
    set_rate(optimizer, 1e-3)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moved = before[id(parameter)] - parameter.detach()
            expected = torch.full_like(moved, 1e-3 * group["lr_scale"])
            torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500-steps", 500, "steps"),
        ("1k-steps", 1000, "steps"),
        ("20M-tokens", 20e6, "tokens"),
        ("1.5G-tokens", 1.5e9, "tokens"),
        ("90s", 90, "seconds"),
        ("5min", 300, "seconds"),
        ("2.5-min", 150, "seconds"),
        (" 1h ", 3600, "seconds"),
    ],
)
def test_budget(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize(
    "text", ["", "5", "steps", "0-steps", "-3s", "5 days", "1e999s", "5m", "0s"]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match="budget must be like 500-steps, 20M-tokens, 1e15-flops"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "steps"), [("7-steps", 7), ("1k-tokens", 31), ("3-tokens", 1), ("1e6-flops", 312)]
)
def test_budget_pays_for_whole_steps(text, steps):
    assert Budget.parse(text).steps(32, flops_per_token=100.0) == steps
