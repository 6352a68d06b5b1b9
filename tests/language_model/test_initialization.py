"""The official initial values, written out again channel by channel, and the parameter groups."""

import math

import pytest
import torch
from model_helpers import ALL_MIXERS, RATES, random_model, random_tokens, small_config

from model.config import ModelConfig
from model.initialization import parameter_groups
from model.language_model import LanguageModel
from model.layers.rwkv6 import RWKV6Options
from model.layers.rwkv7 import RWKV7Options

SHAPES = [(1, 32, 8), (2, 64, 64), (4, 128, 32), (3, 24, 8)]
"""Layers, width, head_dim. In the last, ranks are larger than the width."""
shapes = pytest.mark.parametrize(("num_layers", "width", "head_dim"), SHAPES)


def new_model(mixer, options, num_layers, width, head_dim, vocab_size=50):
    torch.manual_seed(3)
    return LanguageModel(
        ModelConfig(
            mixer=mixer,
            vocab_size=vocab_size,
            d_model=width,
            num_layers=num_layers,
            head_dim=head_dim,
            options=options,
        )
    )


def expect(tensor, values):
    expected = torch.tensor(values, dtype=torch.float64).view(tensor.shape)
    torch.testing.assert_close(tensor.detach().double(), expected, rtol=1e-5, atol=1e-6)


def expect_uniform(weight, bound):
    """Fills [-bound, bound], and is no constant or normal within it."""
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.95 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert abs(weight.mean().item()) < 0.1 * bound


def expect_orthogonal(weight, gain):
    """Rows, or where there are more of them the columns, orthogonal and of length `gain`."""
    weight = weight.detach().double()
    weight = weight.T if weight.shape[0] > weight.shape[1] else weight
    identity = torch.eye(weight.shape[0], dtype=torch.float64)
    torch.testing.assert_close(weight @ weight.T, gain**2 * identity, rtol=1e-4, atol=1e-5)


@shapes
def test_rwkv7_time_mix(num_layers, width, head_dim):
    model = new_model("rwkv7", RWKV7Options(), num_layers, width, head_dim)
    for layer, block in enumerate(model.blocks):
        mix = block.time_mix
        p = layer / (num_layers - 1) if num_layers > 1 else 0.0
        q = 1 - layer / num_layers
        channels = range(width)
        lin = [c / (width - 1) - 0.5 for c in channels]
        z = [(c % head_dim - (head_dim - 1) / 2) / ((head_dim - 1) / 2) for c in channels]
        zz = [math.copysign(x * x, x) for x in z]
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        expect(mix.mix, [[1 - (c / width) ** (powers[n] * q) for c in channels] for n in "rwkvag"])
        expect(
            mix.decay.bias,
            [-6 + 6 * (c / (width - 1)) ** (1 + p**0.3) + 0.5 + 2.5 * zz[c] for c in channels],
        )
        expect(mix.iclr.bias, [-0.19 + 0.3 * zz[c] + 0.4 * lin[c] for c in channels])
        expect(mix.removal_scale, [0.71 - 0.1 * lin[c] for c in channels])
        expect(mix.iclr_scale, [1.02] * width)
        expect(mix.bonus, [-0.04] * width)
        expect(mix.head_norm.weight, [((1 + layer) / num_layers) ** 0.7] * width)
        expect(mix.head_norm.bias, [0.0] * width)
        low_ranks = [mix.decay, mix.iclr, mix.gate]
        if layer == 0:
            assert not hasattr(mix, "value_residual")
        else:
            expect(mix.value_residual.bias, [0.73 - 0.4 * lin[c] for c in channels])
            low_ranks.append(mix.value_residual)
        for low_rank in low_ranks:
            assert not low_rank.down.any()
            rows, columns = low_rank.up.shape
            expect_orthogonal(low_rank.up, 0.1 * math.sqrt(max(rows / columns, 1)))
        assert mix.gate.bias is None
        expect_uniform(mix.receptance.weight, 0.5 / math.sqrt(width))
        expect_uniform(mix.value.weight, 0.5 / math.sqrt(width))
        expect_uniform(mix.key.weight, 0.05 / math.sqrt(width))
        assert not mix.output.weight.any()


@shapes
def test_rwkv7_channel_mix(num_layers, width, head_dim):
    model = new_model("rwkv7", RWKV7Options(), num_layers, width, head_dim)
    for layer, block in enumerate(model.blocks):
        q = 1 - layer / num_layers
        expect(block.channel_mix.mix_key, [1 - (c / width) ** q**4 for c in range(width)])
        expect_uniform(block.channel_mix.key.weight, 0.5 / math.sqrt(width))
        assert not block.channel_mix.value.weight.any()


@shapes
def test_rwkv6_time_mix_and_channel_mix(num_layers, width, head_dim):
    model = new_model("rwkv6", RWKV6Options(), num_layers, width, head_dim)
    for layer, block in enumerate(model.blocks):
        mix, channel_mix, channels = block.time_mix, block.channel_mix, range(width)
        p = layer / (num_layers - 1) if num_layers > 1 else 0.0
        q = 1 - layer / num_layers
        whole = [1 - (c / width) ** q for c in channels]
        half = [1 - (c / width) ** (0.5 * q) for c in channels]
        expect(mix.mix_base, whole)
        expect(mix.mix, [whole, whole, [x - 0.3 * p for x in whole], half, half])
        decay = [-6 + 5 * (c / (width - 1)) ** (0.7 + 1.3 * p) for c in channels]
        expect(mix.decay.bias, decay)
        zigzag = [{0: 0.0, 1: 0.1, 2: -0.1}[c % 3] for c in channels]
        expect(mix.bonus, [p * (1 - c / (width - 1)) + zigzag[c] for c in channels])
        expect(mix.head_norm.weight, [((1 + layer) / num_layers) ** 0.7] * width)
        for matrix in (mix.mix_down, mix.decay.down, mix.output.weight):
            assert not matrix.any()
        expect_uniform(mix.mix_up, 0.01)
        expect_uniform(mix.decay.up, 0.01)
        for linear, gain in ((mix.receptance, 1), (mix.value, 1), (mix.key, 0.1), (mix.gate, 0.1)):
            expect_orthogonal(linear.weight, gain)
        expect(channel_mix.mix_key, whole)
        expect(channel_mix.mix_receptance, whole)
        rows = channel_mix.key.weight.shape[0]
        expect_orthogonal(channel_mix.key.weight, math.sqrt(rows / width))
        assert not channel_mix.receptance.weight.any()
        assert not channel_mix.value.weight.any()


@shapes
def test_rwkv4_time_mix_and_channel_mix(num_layers, width, head_dim):
    model = new_model("rwkv4", None, num_layers, width, head_dim)
    for layer, block in enumerate(model.blocks):
        mix, channel_mix, channels = block.time_mix, block.channel_mix, range(width)
        p = layer / (num_layers - 1) if num_layers > 1 else 0.0
        q = 1 - layer / num_layers
        whole = [(c / width) ** q for c in channels]
        half = [(c / width) ** (0.5 * q) for c in channels]
        expect(mix.mix, [whole, [x + 0.3 * p for x in whole], half])
        expect(mix.decay, [-5 + 8 * (c / (width - 1)) ** (0.7 + 1.3 * p) for c in channels])
        zigzag = [{0: 0.0, 1: 0.5, 2: -0.5}[c % 3] for c in channels]
        expect(mix.bonus, [math.log(0.3) + z for z in zigzag])
        expect_orthogonal(mix.value.weight, 1)
        for matrix in (mix.key, mix.receptance, mix.output, channel_mix.value):
            assert not matrix.weight.any()
        expect(channel_mix.mix_key, whole)
        expect(channel_mix.mix_receptance, whole)
        rows = channel_mix.key.weight.shape[0]
        expect_orthogonal(channel_mix.key.weight, math.sqrt(rows / width))


@shapes
def test_rwkv5_time_mix_and_channel_mix(num_layers, width, head_dim):
    model = new_model("rwkv5", None, num_layers, width, head_dim)
    for layer, block in enumerate(model.blocks):
        mix, channel_mix, channels = block.time_mix, block.channel_mix, range(width)
        p = layer / (num_layers - 1) if num_layers > 1 else 0.0
        q = 1 - layer / num_layers
        whole = [(c / width) ** q for c in channels]
        half = [(c / width) ** (0.5 * q) for c in channels]
        expect(mix.mix, [whole, [x + 0.3 * p for x in whole], half, half])
        expect(mix.decay, [-6 + 5 * (c / (width - 1)) ** (0.7 + 1.3 * p) for c in channels])
        zigzag = [{0: 0.0, 1: 0.1, 2: -0.1}[c % 3] for c in channels]
        expect(mix.bonus, [p * (1 - c / (width - 1)) + zigzag[c] for c in channels])
        expect(mix.head_norm.weight, [((1 + layer) / num_layers) ** 0.7] * width)
        assert not mix.output.weight.any()
        for linear, gain in ((mix.receptance, 1), (mix.value, 1), (mix.key, 0.1), (mix.gate, 0.1)):
            expect_orthogonal(linear.weight, gain)
        expect(channel_mix.mix_key, whole)
        expect(channel_mix.mix_receptance, whole)
        assert not channel_mix.receptance.weight.any()
        assert not channel_mix.value.weight.any()


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_decays_start_as_mamba_2(mixer):
    """A in (1, 16), for Gated DeltaNet (0, 16), and steps between 0.001 and 0.1."""
    model = LanguageModel(ModelConfig(mixer, d_model=512, head_dim=8, num_layers=1))
    mix = model.blocks[0].time_mix
    rate, bias = mix.decay_rate.exp(), getattr(mix, "step_bias", getattr(mix, "decay_bias", None))
    assert (1.0 if mixer == "mamba2" else 0.0) <= rate.min() < 4.0 < 13.0 < rate.max() <= 16.0
    step = torch.nn.functional.softplus(bias)
    assert 0.00099 < step.min() < 0.003 < 0.03 < step.max() < 0.101
    assert step.log().mean().item() == pytest.approx(math.log(0.01), abs=0.5)
    assert mix.convolution.taps.abs().max() <= 0.5
    assert mix.convolution.taps.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    ("mixer", "options"), [("rwkv6", RWKV6Options()), ("rwkv7", RWKV7Options())]
)
@pytest.mark.parametrize("vocab_size", [20, 500])
def test_rwkv_embedding_norms_and_head(mixer, options, vocab_size):
    model = new_model(mixer, options, 2, 64, 16, vocab_size)
    expect_uniform(model.embedding.weight, 1e-4)
    expect_orthogonal(model.head.weight, 0.5 * math.sqrt(max(vocab_size / 64, 1)))
    norms = [model.embedding_norm, model.norm]
    norms += [norm for block in model.blocks for norm in (block.time_norm, block.channel_norm)]
    for norm in norms:
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
        assert norm.eps == 1e-5


@pytest.mark.parametrize("mixer", ["attention", "linear_transformer"])
def test_transformers_start_with_large_embeddings_and_blocks_that_add_nothing(mixer):
    num_layers = 3
    torch.manual_seed(0)
    model = LanguageModel(small_config(mixer, d_model=128, num_layers=num_layers))
    checked = 0
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("time_mix.output.weight", "channel_mix.down.weight"))
        std = {"embedding.weight": 1.0, "head.weight": 0.02}.get(name, math.sqrt(0.4 / 128))
        std = 0.0 if residual else std
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        checked += residual
    assert checked == 2 * num_layers


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_the_seed_fixes_the_weights(mixer):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(LanguageModel(small_config(mixer)))
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert models[0].fingerprint() == models[1].fingerprint() != models[2].fingerprint()
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_a_new_model_is_nearly_undecided(mixer):
    """The loss before training is near that of a guess, log(vocab)."""
    torch.manual_seed(0)
    model = LanguageModel(small_config(mixer, vocab_size=257, d_model=64))
    tokens = random_tokens(4, 65, vocab=257)
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(257), rel=0.1)


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_every_parameter_is_in_exactly_one_group(mixer):
    model = random_model(small_config(mixer))
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert len(set(grouped)) == len(grouped)
    settings = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert len(set(settings)) == len(settings)


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_decay_and_rates_of_every_parameter(mixer):
    model = random_model(small_config(mixer))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates, found = RATES.get(mixer, {}), []
    for group in parameter_groups(model, learning_rate=1e-3, weight_decay=0.1):
        for parameter in group["params"]:
            name = names[id(parameter)]
            matrix = parameter.dim() == 2 and name.endswith(".weight")
            assert group["weight_decay"] == (0.1 if matrix else 0.0), name
            scale = rates.get(name.partition("time_mix.")[2], 1.0)
            assert group["lr_scale"] == scale, name
            assert group["lr"] == pytest.approx(1e-3 * scale)
            found += [scale] if scale != 1.0 else []
    assert sorted(found) == sorted([*rates.values()] * model.config.num_layers)


def test_large_matrices_of_rwkv7_are_decayed_and_nothing_else():
    model = random_model(small_config("rwkv7", num_layers=2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in parameter_groups(model, learning_rate=1.0, weight_decay=0.1)
        for parameter in group["params"]
        if group["weight_decay"]
    }
    linear = [f"time_mix.{name}" for name in ("receptance", "key", "value", "output")]
    linear += ["channel_mix.key", "channel_mix.value"]
    expected = {f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in linear}
    assert decayed == expected | {"embedding.weight", "head.weight"}


def test_an_optimizer_takes_the_groups():
    model = random_model(small_config("rwkv7"))
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2, weight_decay=0.0))
    before = model.blocks[0].time_mix.decay.bias.detach().clone()
    model(random_tokens(1, 8)).logits.square().sum().backward()
    optimizer.step()
    moved = (model.blocks[0].time_mix.decay.bias - before).abs().max().item()
    assert moved == pytest.approx(2e-2, rel=1e-3)
