"""Every mixer that no other implementation vouches for, against its paper's equations in a loop.

One row, token by token, head by head, in float64; the layer runs in all three forms.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from model_helpers import FORMS, assert_close

from model.config import ModelConfig
from model.layers import MIXERS
from model.layers.deltanet import DeltaNetOptions
from model.layers.gla import GLAOptions
from model.layers.layer import Context
from model.layers.mamba2 import Mamba2Options
from model.layers.retnet import RetNetOptions
from model.layers.rotary import document_positions, rotate
from model.layers.short_convolution import ShortConvolution

TIME, WIDTH, HEAD = 9, 16, 8
HEADS = WIDTH // HEAD
RESET = torch.tensor([[False, False, True, False, False, False, True, False, False]])


def layer_of(mixer, options, **changes):
    settings = {"mixer": mixer, "d_model": WIDTH, "head_dim": HEAD, "options": options}
    torch.manual_seed(0)
    layer = MIXERS[mixer].time_mix(ModelConfig(**{**settings, **changes}), 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer.double()


def heads(x, count=HEADS):
    return x.unflatten(-1, (count, -1))


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def convolve(x, taps, bias, reset):
    """The causal convolution and silu of `x [T, D]`, a token and a tap at a time."""
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[0]) if bias is None else bias.clone()
        for lag in range(min(len(taps), t + 1)):
            if not reset[0, t - lag + 1 : t + 1].any():
                y = y + taps[lag] * x[t - lag]
        rows.append(y * torch.sigmoid(y))
    return torch.stack(rows)


def scan(q, k, v, step, reset):
    """`o_t = q_t S_t` with `S_t = step(t, S_{t-1}) + k_t v_t^T`; all `[T, H, .]`."""
    state = torch.zeros(q.shape[1], k.shape[2], v.shape[2], dtype=q.dtype)
    rows = []
    for t in range(len(q)):
        state = torch.zeros_like(state) if reset[0, t] else state
        state = step(t, state) + k[t][:, :, None] * v[t][:, None, :]
        rows.append((q[t][:, :, None] * state).sum(1))
    return torch.stack(rows), state


def check(layer, x, expected, final_matrix):
    for form in FORMS:
        state = layer.initial_state(1)
        y, after = layer(x, state, Context(form=form, reset=RESET))
        assert_close(y.detach(), expected[None].detach(), 1e-10, form)
        assert_close(after.matrix.detach(), final_matrix[None].detach(), 1e-10, form)


@pytest.fixture
def x():
    return torch.randn(1, TIME, WIDTH, dtype=torch.float64)


def test_rwkv4(x):
    """The mean with weights `exp((t-1-j) w + k_j)`, and `exp(u + k_t)` for the token itself."""
    layer = layer_of("rwkv4", None)
    torch.manual_seed(1)
    previous = torch.cat([torch.zeros_like(x[0, :1]), x[0, :-1]])
    previous = previous.masked_fill(RESET[0, :, None], 0.0)
    x_k, x_v, x_r = (x[0] * mix + previous * (1 - mix) for mix in layer.mix)
    k, v, r = layer.key(x_k), layer.value(x_v), torch.sigmoid(layer.receptance(x_r))
    w, rows = -torch.exp(layer.decay), []
    for t in range(TIME):
        start = max((j for j in range(t + 1) if RESET[0, j]), default=0)
        weights = [torch.exp((t - 1 - j) * w + k[j]) for j in range(start, t)]
        weights.append(torch.exp(layer.bonus + k[t]))
        weighed = [weight * v[j] for weight, j in zip(weights, range(start, t + 1), strict=True)]
        rows.append(sum(weighed) / sum(weights))
    expected = layer.output(r * torch.stack(rows))
    for form in FORMS:
        y, after = layer(x, layer.initial_state(1), Context(form=form, reset=RESET))
        assert_close(y[0].detach(), expected.detach(), 1e-10, form)
        assert torch.equal(after.shift, x[:, -1])


def test_retnet(x):
    layer = layer_of("retnet", RetNetOptions(norm_eps=0.1))
    position = torch.tensor([[0, 1, 0, 1, 2, 3, 0, 1, 2]])
    q, k = (rotate(heads(w(x)), position, 1e4)[0] for w in (layer.query, layer.key))
    v = heads(layer.value(x))[0]
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(HEADS)], dtype=x.dtype)
    o, state = scan(q, k, v, lambda t, s: gamma[:, None, None] * s, RESET)
    o = rms(o / math.sqrt(HEAD), layer.head_norm.weight, 0.1).flatten(1)
    assert v.shape == (TIME, HEADS, 2 * HEAD)
    check(layer, x, layer.output(o * F.silu(layer.gate(x[0]))), state)


def test_gla(x):
    layer = layer_of("gla", GLAOptions(norm_eps=0.1))
    q, k, v = (heads(w(x[0])) for w in (layer.query, layer.key, layer.value))
    low = x[0] @ layer.decay.down @ layer.decay.up + layer.decay.bias
    alpha = torch.sigmoid(heads(low)) ** (1 / 16)
    o, state = scan(q, k, v, lambda t, s: alpha[t][:, :, None] * s, RESET)
    o = rms(o / math.sqrt(HEAD / 2), layer.head_norm.weight, 0.1).flatten(1)
    assert state.shape == (HEADS, HEAD // 2, HEAD)
    check(layer, x, layer.output(o * F.silu(layer.gate(x[0]))), state)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("mixer", ["deltanet", "gated_deltanet"])
def test_deltanet(x, mixer, negative):
    options = DeltaNetOptions(norm_eps=0.1, negative_eigenvalues=negative)
    layer = layer_of(mixer, options)
    joined = torch.cat([w(x[0]) for w in (layer.query, layer.key, layer.value)], dim=-1)
    q, k, v = convolve(joined, layer.convolution.taps, None, RESET).chunk(3, dim=-1)
    q, k, v = heads(q), heads(k), heads(v)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    beta = (2 if negative else 1) * torch.sigmoid(layer.beta(x[0]))[..., None]
    alpha = torch.ones(TIME, HEADS, dtype=x.dtype)
    if mixer == "gated_deltanet":
        steps = F.softplus(layer.decay(x[0]) + layer.decay_bias)
        alpha = torch.exp(-layer.decay_rate.exp() * steps)

    def erase(t, state):
        """`alpha (I - beta k k^T) S`: what stands under the key is taken out."""
        identity = torch.eye(HEAD, dtype=x.dtype)
        outer = (beta[t] * k[t])[:, :, None] * k[t][:, None, :]
        return alpha[t][:, None, None] * ((identity - outer) @ state)

    o, state = scan(q, beta * k, v, erase, RESET)
    o = rms(o / math.sqrt(HEAD), layer.head_norm.weight, 0.1).flatten(1)
    if mixer == "gated_deltanet":
        o = o * F.silu(layer.gate(x[0]))
    check(layer, x, layer.output(o), state)


@pytest.mark.parametrize(("groups", "ffn_dim"), [(1, None), (2, 24)])
def test_mamba2(x, groups, ffn_dim):
    options = Mamba2Options(state_size=6, groups=groups)
    layer = layer_of("mamba2", options, ffn_dim=ffn_dim)
    inner, count = ffn_dim or 2 * WIDTH, 2 * HEADS
    projected = layer.input(x[0])
    z, xbc, dt = projected.split([inner, inner + 2 * groups * 6, count], dim=-1)
    xbc = convolve(xbc, layer.convolution.taps, layer.convolution.bias, RESET)
    value, b, c = xbc.split([inner, groups * 6, groups * 6], dim=-1)
    value = heads(value, count)
    b, c = (heads(y, groups)[:, [h * groups // count for h in range(count)]] for y in (b, c))
    dt = torch.log1p(torch.exp(dt + layer.step_bias))
    decay = torch.exp(dt * -torch.exp(layer.decay_rate))
    o, state = scan(c, b, value * dt[..., None], lambda t, s: decay[t][:, None, None] * s, RESET)
    y = (o + layer.skip[:, None] * value).flatten(1) * F.silu(z)
    assert state.shape == (count, 6, inner // count)
    check(layer, x, layer.output(rms(y, layer.norm.weight, 1e-6)), state)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"ffn_dim": 30}, Mamba2Options(), "4 heads, so ffn_dim must be a multiple of that"),
        ({}, Mamba2Options(groups=3), "4 heads, which do not fall into 3 groups"),
    ],
)
def test_mamba2_refuses_widths_that_do_not_divide(changes, options, message):
    config = ModelConfig("mamba2", d_model=16, head_dim=8, options=options, **changes)
    with pytest.raises(ValueError, match=message):
        MIXERS["mamba2"].time_mix.check(config)


@pytest.mark.parametrize(("mixer", "said"), [("retnet", "rotary"), ("gla", "halves head_dim")])
def test_odd_heads_are_refused(mixer, said):
    with pytest.raises(ValueError, match=said):
        MIXERS[mixer].time_mix.check(ModelConfig(mixer, d_model=9, head_dim=3))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_short_convolution_in_pieces(size, bias):
    """Cut anywhere with the window carried on, and with documents that start anywhere."""
    layer = ShortConvolution(3, size, bias=bias).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(1, TIME, 3, dtype=torch.float64)
    expected = convolve(x[0], layer.taps, layer.bias, RESET)
    for cut in range(1, TIME):
        window, rows = layer.initial_window(1), []
        for part in (slice(0, cut), slice(cut, TIME)):
            pieces = x[:, part].split([1, 2], dim=-1)
            y, window = layer(pieces, window, RESET[:, part])
            rows.append(torch.cat(y, dim=-1)[0])
        assert_close(torch.cat(rows).detach(), expected.detach(), 1e-12)
        kept = x[0, TIME - size + 1 :].clone()
        kept[: max(0, size - 1 - 3)] = 0.0  # the last document has three tokens
        assert torch.equal(window[0], kept)


def test_document_positions():
    before = torch.tensor([5])
    plain = document_positions(before, TIME, None)
    assert plain.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert document_positions(before, TIME, RESET).tolist() == [[5, 6, 0, 1, 2, 3, 0, 1, 2]]
