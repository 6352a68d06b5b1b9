"""Heads of the additive recurrence that share q and k compute what they do with copies of them."""

import pytest
import torch
from helpers import every_way, way
from marks import needs_kernels


def inputs(batch, shared, heads, *, decay=True, state=True, time=37, key_dim=10, value_dim=18):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {
        "q": normal(batch, time, shared, key_dim),
        "k": normal(batch, time, shared, key_dim),
        "v": normal(batch, time, heads, value_dim),
    }
    if decay:
        found["log_decay"] = -normal(batch, time, heads).abs()
    if state:
        found["initial_state"] = normal(batch, heads, key_dim, value_dim)
    return found


def results(function, given, heads=None):
    """Outputs and gradients; with `heads`, of copies of q and k for as many."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    taken = dict(leaves)
    if heads is not None:
        for name in ("q", "k"):
            x = leaves[name]
            taken[name] = x.repeat_interleave(heads // x.shape[2], dim=2)
    reset = torch.zeros(given["v"].shape[:2], dtype=torch.bool)
    reset[0, 20] = True
    o, state = function(**taken, reset=reset, scale=0.5)
    loss = (o * torch.arange(o.numel()).view_as(o).cos()).sum() + state.square().sum()
    gradients = torch.autograd.grad(loss, [*leaves.values()])
    return {"o": o, "state": state} | dict(zip(leaves, gradients, strict=True))


@every_way("additive")
@pytest.mark.parametrize(("batch", "shared", "heads"), [(1, 1, 4), (3, 2, 6), (2, 1, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_shared_heads_are_copies(op, form, batch, shared, heads, threads, poisoned_memory):
    torch.set_num_threads(threads)
    given = inputs(batch, shared, heads)
    found = results(way(op, form), given)
    expected = results(way(op, "recurrent"), given, heads)
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        error = (found[name] - x).abs().max() / x.abs().max()
        assert error < 1e-9, name


@needs_kernels
def test_several_stretches_of_columns_add_up():
    given = inputs(2, 1, 3, state=False, value_dim=150)
    found, expected = (
        results(way("additive", form), given, heads)
        for form, heads in (("native", None), ("recurrent", 3))
    )
    for name, x in expected.items():
        assert (found[name] - x).abs().max() / x.abs().max() < 1e-9, name


@every_way("additive")
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x | {"bonus": torch.ones(4, 10, dtype=torch.float64)},
        lambda x: x | {"log_decay": -torch.ones(1, 37, 4, 10, dtype=torch.float64)},
        lambda x: x | {n: x[n].repeat(1, 1, 3, 1) for n in ("q", "k")},
        lambda x: x | {n: x[n].repeat(1, 1, 8, 1) for n in ("q", "k")},
    ],
    ids=["bonus", "decay_of_channels", "no_whole_number", "too_many"],
)
def test_what_cannot_be_shared_is_refused(op, form, change):
    with pytest.raises(ValueError, match="they can be shared by a whole number of heads each"):
        way(op, form)(**change(inputs(1, 1, 4)))


@every_way("additive")
def test_q_has_the_heads_of_k(op, form):
    given = inputs(1, 2, 4)
    given["q"] = given["q"][:, :, :1]
    with pytest.raises(ValueError, match=r"q must be \[1, 37, 2, 10\] as k is"):
        way(op, form)(**given)
