"""The small parts of the layers, each against its formula written another way."""

import cmath
import math

import pytest
import torch
from model_helpers import assert_close

from model.config import ModelConfig
from model.layers import MIXERS
from model.layers.channel_mix import RWKV6ChannelMix, RWKV7ChannelMix, SwiGLU
from model.layers.feature_maps import elu_plus_one
from model.layers.layer import Context, Layer
from model.layers.linear_transformer import LinearTransformerOptions
from model.layers.low_rank import LowRank
from model.layers.norm import HeadNorm, LayerNorm, RMSNorm
from model.layers.rotary import rotate
from model.layers.rwkv6 import RWKV6Options
from model.layers.rwkv7 import RWKV7Options, default_rank
from model.layers.token_shift import interpolations
from model.ops import OPS


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@torch.no_grad()
def randomised(module):
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return module.double()


def test_the_table_names_layers_ops_and_sources():
    for name, row in MIXERS.items():
        assert issubclass(row.time_mix, Layer), name
        assert row.channel_mix is None or issubclass(row.channel_mix, Layer), name
        assert row.op in OPS, name
        assert row.source.startswith("arXiv "), name


def test_token_shift_is_the_token_before():
    x, last = normal(2, 5, 3), normal(2, 3)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[0, 0] = reset[1, 3] = True
    (previous,), carried = interpolations(x, last, torch.ones(1, 3, dtype=torch.float64), reset)
    for b in range(2):
        for t in range(5):
            expected = last[b] if t == 0 else x[b, t - 1]
            expected = torch.zeros(3, dtype=torch.float64) if reset[b, t] else expected
            assert_close(previous[b, t], expected, 1e-14)
    assert torch.equal(carried, x[:, -1])


def test_rotation_is_a_product_with_a_complex_number():
    x, base = normal(2, 3, 2, 6), 100.0
    position = torch.tensor([[0, 1, 2], [5, 70, 4000]])
    turned = rotate(x, position, base)
    for b in range(2):
        for t in range(3):
            for h in range(2):
                for i in range(3):
                    angle = position[b, t].item() * base ** (-2 * i / 6)
                    pair = complex(x[b, t, h, i], x[b, t, h, i + 3]) * cmath.exp(1j * angle)
                    assert turned[b, t, h, i].item() == pytest.approx(pair.real, abs=1e-9)
                    assert turned[b, t, h, i + 3].item() == pytest.approx(pair.imag, abs=1e-9)


@pytest.mark.parametrize("offset", [0, 1_000_000])
def test_rotated_products_depend_on_the_distance_only(offset):
    """In float32, far out: the angles are formed in float64."""
    q, k = (torch.randn(1, 8, 1, 64) for _ in range(2))
    here, there = torch.arange(8)[None], torch.arange(8)[None] + 17 + offset
    products = [
        torch.einsum("bthk,bshk->bts", rotate(q, at, 1e4), rotate(k, at, 1e4))
        for at in (here, there)
    ]
    assert_close(products[1], products[0], 1e-5)


def test_low_rank_is_bias_plus_two_products():
    x = normal(2, 3, 5)
    layer = randomised(LowRank(5, 2, 7, activation=torch.tanh))
    expected = layer.bias + torch.tanh(x @ layer.down) @ layer.up
    assert_close(layer(x), expected, 1e-12)
    plain = randomised(LowRank(5, 2, 7, bias=False))
    assert_close(plain(x), x @ plain.down @ plain.up, 1e-12)
    assert plain.bias is None
    assert {name for name, _ in layer.named_parameters()} == {"down", "up", "bias"}


def test_head_norm_normalises_every_head_by_itself():
    x, eps = normal(2, 3, 4, 5) * 0.01, 64e-5
    norm = randomised(HeadNorm(4, 5, eps))
    y = norm(x)
    for h in range(4):
        head, own = x[:, :, h], slice(5 * h, 5 * h + 5)
        centred = head - head.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        expected = scaled * norm.weight[own] + norm.bias[own]
        assert_close(y[..., own], expected, 1e-12)


def test_layer_norm_and_rms_norm():
    x = normal(2, 7) * 0.01
    layer_norm, rms_norm = randomised(LayerNorm(7)), randomised(RMSNorm(7))
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(layer_norm(x), expected * layer_norm.weight + layer_norm.bias, 1e-12)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * rms_norm.weight
    assert_close(rms_norm(x), expected, 1e-12)


def test_elu_plus_one():
    x = torch.tensor([-30.0, -1.0, -0.0, 0.0, 2.0], dtype=torch.float64)
    expected = [math.exp(v) if v < 0 else v + 1 for v in x.tolist()]
    assert_close(elu_plus_one(x), torch.tensor(expected, dtype=torch.float64), 1e-12)
    assert (elu_plus_one(x) > 0).all()


@pytest.mark.parametrize(
    ("d_model", "decay", "value", "gate"),
    [(768, 64, 32, 128), (2048, 128, 64, 224), (64, 32, 32, 32)],
)
def test_default_ranks(d_model, decay, value, gate):
    """2.5, 1.7 and 5 times the root of D; those of 768 are the official 0.1B model's."""
    assert default_rank(2.5, d_model) == decay
    assert default_rank(1.7, d_model) == value
    assert default_rank(5.0, d_model) == gate


def test_ranks_in_the_options_are_taken():
    ranks = {"decay": 3, "iclr": 4, "value_residual": 5, "gate": 6}
    options = RWKV7Options(decay_rank=3, iclr_rank=4, value_rank=5, gate_rank=6)
    layer = MIXERS["rwkv7"].time_mix(ModelConfig(d_model=64, options=options), 1)
    for name, rank in ranks.items():
        assert getattr(layer, name).down.shape == (64, rank)
        assert getattr(layer, name).up.shape == (rank, 64)
    options = RWKV6Options(shift_rank=3, decay_rank=4)
    layer = MIXERS["rwkv6"].time_mix(ModelConfig(mixer="rwkv6", d_model=64, options=options), 0)
    assert layer.mix_up.shape == (5, 3, 64)
    assert layer.decay.down.shape == (64, 4)


@pytest.mark.parametrize(
    ("kind", "mixer", "options", "default"),
    [
        (SwiGLU, "linear_transformer", LinearTransformerOptions(), 352),  # 8/3 of 128 is 341
        (RWKV6ChannelMix, "rwkv6", RWKV6Options(), 448),
        (RWKV7ChannelMix, "rwkv7", RWKV7Options(), 512),
    ],
)
def test_channel_mixers(kind, mixer, options, default):
    config = ModelConfig(mixer=mixer, d_model=128, ffn_dim=40, options=options)
    layer, x = randomised(kind(config, 0)), normal(2, 4, 128) * 0.1
    weight = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    shift, state = normal(2, 128), layer.initial_state(2)
    before = torch.cat([shift[:, None], x[:, :-1]], dim=1)
    if kind is SwiGLU:
        gate = x @ weight["gate.weight"].T
        expected = gate * torch.sigmoid(gate) * (x @ weight["up.weight"].T)
        expected = expected @ weight["down.weight"].T
    else:
        state = type(state)(shift)
        mixed = x * (1 - weight["mix_key"]) + before * weight["mix_key"]
        hidden = (mixed @ weight["key.weight"].T).clamp(min=0) ** 2
        expected = hidden @ weight["value.weight"].T
    if kind is RWKV6ChannelMix:
        mixed = x * (1 - weight["mix_receptance"]) + before * weight["mix_receptance"]
        expected = expected / (1 + torch.exp(-mixed @ weight["receptance.weight"].T))
    y, after = layer(x, state, Context(form="chunked"))
    assert_close(y, expected, 1e-12)
    for tensor in after:
        assert torch.equal(tensor, x[:, -1])
    wide = kind(ModelConfig(mixer=mixer, d_model=128, options=options), 0)
    assert {max(p.shape) for p in wide.parameters() if p.dim() == 2} - {128} == {default}


def test_linear_transformer_is_attention_with_another_weight():
    """`o_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps)`, a loop a head."""
    options = LinearTransformerOptions(eps=0.3)
    config = ModelConfig(mixer="linear_transformer", d_model=12, head_dim=4, options=options)
    layer, x = randomised(MIXERS["linear_transformer"].time_mix(config, 0)), normal(1, 7, 12)
    q, k, v = ((x[0] @ p.weight.T).detach() for p in (layer.query, layer.key, layer.value))
    o = torch.zeros(7, 12, dtype=torch.float64)
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        for i in range(7):
            phi_q = torch.where(q[i, own] < 0, q[i, own].exp(), q[i, own] + 1)
            phi_k = torch.where(k[: i + 1, own] < 0, k[: i + 1, own].exp(), k[: i + 1, own] + 1)
            weights = phi_k @ phi_q
            o[i, own] = weights @ v[: i + 1, own] / (weights.sum() + 0.3)
    for form in ("parallel", "chunked", "recurrent"):
        y, state = layer(x, layer.initial_state(1), Context(form=form))
        assert_close(y[0], o @ layer.output.weight.T, 1e-12)
        assert state.matrix.shape == (1, 3, 4, 5)
