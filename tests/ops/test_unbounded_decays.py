"""Decays of any strength over thousands of steps, in float32, against float64 token by token.

Each head has decays of its own kind and is compared by itself: next to a gradient of ordinary size
that of a decay of -50 would count for nothing.
"""

import pytest
import torch
from helpers import Case, assert_close, make_inputs, run, way, ways

from model.ops.native import scan

TIME, CHANNELS = 4096, 8


def constant(log_decay):
    return lambda: torch.full((TIME, CHANNELS), log_decay)


def mixed():
    """Every step and channel from another distribution: none, from -1e-6 to -50, or all at once."""
    generator = torch.Generator().manual_seed(0)
    u, kind = torch.rand(2, TIME, CHANNELS, generator=generator)
    wide = -(10 ** (7.7 * u - 6))
    return torch.where(kind < 0.2, 0.0, wide).masked_fill(kind > 0.995, -torch.inf)


def a_decay_for_each_channel():
    decays = (0.0, -torch.inf, -1e-6, -1e-3, -0.3, -5.0, -50.0, -0.01)
    return torch.tensor(decays).expand(TIME, CHANNELS)


def strong_between_none():
    strong = torch.arange(TIME)[:, None] % 97 == 5
    return torch.where(strong, -50.0, 0.0).expand(TIME, CHANNELS)


WEAK = {"zero": constant(0.0), "tiny": constant(-1e-4), "small": constant(-0.6)}
STRONG = {
    "some": constant(-2.0),
    "much": constant(-8.0),
    "strongest": constant(-50.0),
    "wiped": constant(-torch.inf),
    "mixed": mixed,
    "a_decay_for_each_channel": a_decay_for_each_channel,
    "strong_between_none": strong_between_none,
}


def check(op, log_decay, parts, **changes):
    """Outputs, final state and all gradients in float32, part by part, chunked and native.

    Args:
        op: the op.
        log_decay: what it takes, in float32.
        parts: by name, a function of a result's name and value: what of it belongs to the part.
        changes: of the case.
    """
    case = Case(**{"state": True, "batch": 1, "time": TIME, "value_dim": 4} | changes)

    def results(form, dtype):
        inputs = make_inputs(op, case, dtype) | {"log_decay": log_decay.to(dtype)}
        return run(way(op, form), inputs)

    expected = results("recurrent", torch.float64)
    for form in ways(op):
        if form not in ("chunked", "native"):
            continue
        actual = results(form, torch.float32)
        for part, take in parts.items():
            both = ({n: take(n, x) for n, x in r.items()} for r in (actual, expected))
            try:
                assert_close(*both, torch.float32)
            except AssertionError as error:
                raise AssertionError(f"{form}, {part}: {error}") from error


def head(number):
    """Where in a result of an op with heads that head stands."""
    axes = {"grad bonus": 0, "final_state": 1, "grad initial_state": 1}
    return lambda name, x: x.select(axes.get(name, 2), number)


@pytest.mark.parametrize(
    ("op", "decays", "per_channel"),
    [
        pytest.param("additive", WEAK, True, id="additive_weak"),
        pytest.param("additive", STRONG, True, id="additive_strong"),
        pytest.param("additive", WEAK, False, id="additive_weak_heads"),
        pytest.param("additive", STRONG, False, id="additive_strong_heads"),
        pytest.param("bonus", STRONG, True, id="bonus_strong"),
        pytest.param("delta", WEAK, True, id="delta_weak"),
        pytest.param("delta", STRONG, True, id="delta_strong"),
        pytest.param("delta", STRONG, False, id="delta_strong_heads"),
    ],
)
def test_a_decay_for_every_step(op, decays, per_channel, monkeypatch):
    monkeypatch.setattr(scan, "SMALLEST_BY_CHUNKS", 1)
    log_decay = torch.stack([draw() for draw in decays.values()], dim=1)[None]
    check(
        "additive" if op == "bonus" else op,
        log_decay if per_channel else log_decay[..., 0],
        {name: head(number) for number, name in enumerate(decays)},
        heads=len(decays),
        key_dim=CHANNELS,
        bonus=op == "bonus",
        scale=0.35,
    )


def channels(number):
    """A stretch of the channels, which are the last axis of every result."""
    return lambda _, x: x[..., number * CHANNELS : (number + 1) * CHANNELS]


def test_wkv4_with_a_decay_for_every_channel():
    decays = WEAK | STRONG
    log_decay = torch.cat([draw()[0] for draw in decays.values()])
    parts = {name: channels(number) for number, name in enumerate(decays)}
    check("wkv4", log_decay, parts, key_dim=len(log_decay))
