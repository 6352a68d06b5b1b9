"""The most memory that tensors take at once, of work whose tensors are known."""

import torch
from model_helpers import random_model, random_tokens, small_config

from model import state as states
from model.generation import prefill
from train.benchmark import measure_decoding, peak_memory
from train.tensor_memory import TensorMemory

KB = 256
"""Numbers of float32 in 1,024 bytes."""


def test_what_lives_at_once_counts():
    with TensorMemory() as memory:
        a = torch.ones(KB)
        assert memory.peak == 1024
        b = torch.ones(2 * KB)
        assert memory.peak == 3 * 1024
        del b
        c = torch.ones(KB)
        assert memory.peak == 3 * 1024
        del a, c
        _d = torch.ones(4 * KB)
    assert memory.peak == 4 * 1024


def test_results_between_count_while_they_live():
    x = torch.ones(KB)
    with TensorMemory() as memory:
        y = (x + 1) * 2  # the sum is still there when the product is made
    assert memory.peak == 2 * 1024
    assert y.sum() == 4 * KB


def test_views_and_changes_in_place_take_nothing():
    with TensorMemory() as memory:
        x = torch.ones(KB)
        y = x.view(2, -1).T[:3]
        y.mul_(2)
        x.add_(1)
        torch.add(x, 1, out=x)
    assert memory.peak == 1024


def test_a_view_keeps_all_of_its_memory():
    with TensorMemory() as memory:
        x = torch.ones(3 * KB)[:1]
        _y = torch.ones(KB)
    assert x == 1
    assert memory.peak == 4 * 1024


def test_tensors_from_before_do_not_count():
    x = torch.ones(100 * KB)
    with TensorMemory() as memory:
        x.mul_(2)
        _y = x[:5]
    assert memory.peak == 0


def test_several_results_of_one_operator():
    x = torch.ones(KB, dtype=torch.float32)
    with TensorMemory() as memory:
        values, places = x.sort()
    assert values.shape == places.shape
    assert memory.peak == 1024 + 2048


def test_peak_of_softmax_is_that_of_moving_its_cache():
    """The old cache, and the new one with room for as many tokens again; little beside them."""
    model = random_model(small_config("attention"), dtype=torch.float32)
    weights = sum(4 * p.numel() for p in model.parameters())
    _, state = prefill(model, random_tokens(1, 500), model.initial_state(1))
    cache = states.num_bytes(state)
    found = peak_memory(model, state) - weights - cache
    moved = 3 * 2 * (2 * 501) * 32 * 4  # layers, key and value, tokens, width, bytes
    assert moved < found < 1.05 * moved
    assert states.num_bytes(state) == cache


def test_peak_of_a_recurrence_holds_weights_and_states_whatever_was_read():
    model = random_model(small_config("gla"), dtype=torch.float32)
    found = measure_decoding({"gla": model}, contexts=[4, 64], tokens=1, advance=lambda: None)
    short, long = found["gla"]
    least = sum(4 * p.numel() for p in model.parameters()) + 2 * short.state_bytes
    assert least < short.peak_memory_bytes < 4 * least
    assert short.peak_memory_bytes == long.peak_memory_bytes
