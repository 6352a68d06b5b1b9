"""Work and memory of generation, counted."""

import inspect

import pytest
import torch
from model_helpers import (
    RECURRENT,
    random_model,
    random_tokens,
    small_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import decode
from model import state as states
from model.generation import generate, prefill
from model.sampling import Sampling


class Meter(TorchDispatchMode):
    """Counts the operations and the bytes of what they return."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [x.numel() * x.element_size() for x in found if isinstance(x, torch.Tensor)]
        self.operations += 1
        self.bytes += sum(sizes)
        self.largest = max([self.largest, *sizes])
        return result


def cost_of_a_token(generation):
    """Of drawing and reading one: operations, floating-point operations, bytes, bytes of state."""
    with FlopCounterMode(display=False) as flops, Meter() as meter:
        next(generation)
    size = states.num_bytes(generation.state)
    counts = (meter.operations, flops.get_total_flops(), meter.bytes, size)
    assert all(counts)
    return counts


def metered(mixer, position):
    """A generation of which `position` tokens have been read."""
    config = small_config(mixer, num_layers=1, head_dim=16)
    model = random_model(config, dtype=torch.float32)
    sampling = Sampling(1.2, 0.8, top_k=10, top_p=0.9)
    tokens = random_tokens(1, position)[0].tolist()
    return generate(model, [tokens], max_tokens=100_000, sampling=sampling)


@pytest.mark.parametrize("mixer", RECURRENT)
def test_work_and_memory_of_a_token_do_not_grow_with_the_position(mixer, monkeypatch):
    """To 100,000 tokens, exactly, in operations and bytes: those of PyTorch, which count.

    The native step runs one list of instructions whatever the position.
    """
    monkeypatch.setattr(decode, "why_not", lambda model: "PyTorch is meant")
    young, old = metered(mixer, 10), metered(mixer, 100_000)
    expected = cost_of_a_token(young)
    assert cost_of_a_token(old) == expected
    for _ in range(100):
        next(young)
        next(old)
    assert cost_of_a_token(young) == cost_of_a_token(old) == expected
    assert old.logits.isfinite().all()


def test_the_same_counts_grow_for_softmax_attention():
    young, old = metered("attention", 10), metered("attention", 1000)
    next(young), next(old)  # makes room in the cache, which is not a token's work
    before = cost_of_a_token(young)
    later = [cost_of_a_token(young) for _ in range(5)][-1]
    far = cost_of_a_token(old)
    for place in (2, 3):  # the counter of floating-point operations does not know the fused kernel
        assert before[place] < later[place] < far[place]


@pytest.mark.parametrize("mixer", RECURRENT)
def test_memory_of_a_prefill_does_not_grow_with_the_prompt(mixer):
    model = random_model(small_config(mixer, num_layers=1), dtype=torch.float32)
    largest = []
    for length in (512, 4096):
        tokens = random_tokens(1, length)
        with Meter() as meter:
            prefill(model, tokens, chunk=256)
        largest.append(meter.largest)
    assert largest[0] == largest[1]


def test_the_stretch_of_a_prefill_is_what_bounds_it():
    """The check above can fail: in one stretch the largest tensor is larger."""
    model = random_model(small_config("rwkv7", num_layers=1), dtype=torch.float32)
    assert inspect.signature(prefill).parameters["chunk"].default == 1024
    largest = []
    for chunk in (256, 4096):
        with Meter() as meter:
            prefill(model, random_tokens(1, 4096), chunk=chunk)
        largest.append(meter.largest)
    assert largest[1] > 4 * largest[0]
