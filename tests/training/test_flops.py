"""Floating-point operations: counted by hand, by numbers that count, and by PyTorch."""

import pytest
import torch
from model_helpers import ALL_MIXERS, VOCAB, small_config
from torch.utils.flop_counter import FlopCounterMode

from model.language_model import LanguageModel
from model.layers.attention import AttentionOptions
from model.ops import OPS
from train.flops import FORMULAS, training_flops_per_token

D, LAYERS, FFN, TIME = 32, 3, 48, 10
HEADS, WIDTH = 4, 8


def per_token(mixer, context=TIME):
    return training_flops_per_token(small_config(mixer, ffn_dim=FFN), context)


def by_hand(time_mix, channel_mix, op):
    """Two operations for each weight of a matrix, thrice; and those of the op."""
    matrices = LAYERS * (time_mix + channel_mix) + D * VOCAB
    return 3 * (2 * matrices + LAYERS * op)


@pytest.mark.parametrize("context", [1, 10, 64])
def test_softmax_by_hand(context):
    """Each token meets (T + 1) / 2 tokens on average: a product of K and one of V each."""
    op = (context + 1) / 2 * HEADS * 2 * (WIDTH + WIDTH)
    assert per_token("attention", context) == by_hand(4 * D * D, 3 * D * FFN, op)


@pytest.mark.parametrize("context", [1, 64])
def test_recurrences_by_hand(context):
    """A token costs the same in every context."""
    op = 4 * HEADS * WIDTH * (WIDTH + 1)  # the normaliser is one more value
    expected = by_hand(4 * D * D, 3 * D * FFN, op)
    assert per_token("linear_transformer", context) == expected
    expected = by_hand(4 * D * D, D * D + 2 * D * FFN, 11 * D)
    assert per_token("rwkv4", context) == expected


class Number:
    """Counts the operations that it takes part in."""

    count = 0

    def _operate(self, other=None):
        Number.count += 1
        return self

    __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = exp = _operate


def states(keys, values):
    return [[Number() for _ in range(values)] for _ in range(keys)]


def additive_token(keys, values, decay):
    """`S = decay S + k v^T`, `o = q S`."""
    state, k, v, q, w = (states(keys, values), *(Number() for _ in range(4)))
    for row in state:
        for at in range(values):
            row[at] = (w * row[at] if decay else row[at]) + k * v
    for at in range(values):
        sum(q * row[at] for row in state)


def delta_token(keys, values, decay):
    """As additive, and `b (a S)` is added."""
    state, a, b = states(keys, values), Number(), Number()
    removed = [sum(a * row[at] for row in state) for at in range(values)]
    for row in state:
        for at in range(values):
            row[at] = row[at] + b * removed[at]
    additive_token(keys, values, decay)


def wkv4_channel():
    """The numerator and the denominator decay; the present token has a weight of its own."""
    num, den, decay, k, own, v = (Number() for _ in range(6))
    weight, present = k.exp(), own.exp()
    (num + present * v) / (den + present)
    decay * num + weight * v
    decay * den + weight


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(("name", "token"), [("additive", additive_token), ("delta", delta_token)])
def test_formulas_count_what_the_equation_does(name, token, decay):
    batch, time, heads, keys, values = 2, 5, 3, 4, 6
    q = torch.empty(batch, time, heads, keys)
    v = torch.empty(batch, time, heads, values)
    Number.count = 0
    token(keys, values, decay)
    found = FORMULAS[name](q, q, v, log_decay=q if decay else None)
    assert found == batch * time * heads * Number.count


def test_formula_of_wkv4():
    Number.count = 0
    wkv4_channel()
    k = torch.empty(2, 5, 7)
    assert FORMULAS["wkv4"](k, k) == k.numel() * Number.count


def test_a_whole_training_step_as_pytorch_counts_it():
    """Of a score that runs in plain matrix products, whose count has the whole square in it."""
    config = small_config("attention", ffn_dim=FFN, options=AttentionOptions(score="square_l1"))
    model, tokens = LanguageModel(config), torch.zeros(2, TIME, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    hidden = TIME * TIME - TIME * (TIME + 1) / 2
    surplus = 3 * LAYERS * HEADS * 2 * (WIDTH + WIDTH) * hidden
    expected = counter.get_total_flops() / (2 * TIME) - surplus / TIME
    assert training_flops_per_token(config, TIME) == expected


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_every_mixer_is_counted_and_no_op_is_left_replaced(mixer, monkeypatch):
    before = dict(OPS)
    for name in OPS:
        monkeypatch.setitem(FORMULAS, name, lambda *args, **kwargs: 0.0)
    config = small_config(mixer, ffn_dim=None, vocab_size=VOCAB + 1)  # of no other test
    without = training_flops_per_token.__wrapped__(config, TIME)
    monkeypatch.undo()
    assert training_flops_per_token.__wrapped__(config, TIME) > without > 0
    assert before == OPS


def test_ops_come_back_after_an_error(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no")

    before = dict(OPS)
    monkeypatch.setitem(FORMULAS, "additive", fail)
    with pytest.raises(RuntimeError):
        training_flops_per_token.__wrapped__(small_config("gla"), TIME)
    assert before == OPS


def test_every_op_has_a_formula():
    assert FORMULAS.keys() == OPS.keys()
