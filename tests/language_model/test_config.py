"""The shape of a network: strict in, the same out."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import ALL_MIXERS

from model.config import SIZES, ModelConfig
from model.language_model import LanguageModel, shapes_only
from model.layers import MIXERS
from model.layers.attention import AttentionOptions
from model.layers.rwkv6 import RWKV6Options
from model.layers.rwkv7 import RWKV7Options
from model.ops.scores import SCORES
from model.presets import complete, from_dict, parse_mixer, preset

POSITIVE = st.integers(1, 10**6)
VALUES = {
    int: POSITIVE,
    int | None: st.none() | POSITIVE,
    float: st.floats(1e-12, 1.0),
    bool: st.booleans(),
}


SCORE_NAMES = [
    *SCORES,
    *("polynomial:1", "polynomial:4", "entmax:1.3", "entmax:2", "square_l1:cache"),
    "square_l1:constant:sum_eps=0.5",
    *("square_l1:constant", "taylor:constant", "polynomial:constant", "polynomial:2:constant"),
]
"""Scores with their parameters and states, as the command line names them."""


def _attention(words, rotary_base):
    return AttentionOptions.from_words([*words.split(":"), f"rotary_base={rotary_base!r}"])


def options_of(mixer):
    """Any options that a mixer can have, drawn by the types of its settings."""
    kind = MIXERS[mixer].time_mix.Options
    if kind is AttentionOptions:
        return st.builds(_attention, st.sampled_from(SCORE_NAMES), VALUES[float])
    drawn = {f.name: VALUES[f.type] for f in dataclasses.fields(kind) if f.name != "groups"}
    return st.builds(kind, **drawn)  # any number of heads falls into one group


@st.composite
def configs(draw):
    mixer = draw(st.sampled_from(sorted(MIXERS)))
    head_dim = 2 * draw(st.integers(1, 64))
    config = ModelConfig(
        mixer=mixer,
        vocab_size=draw(POSITIVE),
        d_model=head_dim * draw(st.integers(1, 32)),
        num_layers=draw(st.integers(1, 99)),
        head_dim=head_dim,
        options=draw(options_of(mixer)),
    )
    step = MIXERS[mixer].time_mix.width_step(config)
    return dataclasses.replace(config, ffn_dim=draw(st.none() | POSITIVE.map(lambda n: n * step)))


@settings(max_examples=60)
@given(config=configs())
def test_json_brings_back_the_same(config):
    text = json.dumps(config.to_dict())
    assert from_dict(json.loads(text)) == config
    assert config.num_heads * config.head_dim == config.d_model


@settings(max_examples=25)
@given(config=configs(), name=st.text(min_size=1, max_size=8), inside=st.booleans())
def test_unknown_settings_are_named_and_refused(config, name, inside):
    values = config.to_dict()
    table = values["options"] if inside else values
    kind = type(config.options) if inside else ModelConfig
    if name in table:
        name += "_"
    table[name] = 1
    with pytest.raises(ValueError, match=f"^{kind.__name__} has no setting ") as error:
        from_dict(values)
    assert name in str(error.value)


def test_settings_left_out_take_their_defaults():
    assert from_dict({"mixer": "rwkv7"}) == complete(ModelConfig())
    assert from_dict({"mixer": "rwkv6", "d_model": 128}) == ModelConfig(
        mixer="rwkv6", d_model=128, options=RWKV6Options()
    )


@pytest.mark.parametrize("name", ["vocab_size", "d_model", "num_layers", "head_dim", "ffn_dim"])
@pytest.mark.parametrize("value", [0, -1, 64.0, "64", True, [64]])
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a positive integer, but is "):
        ModelConfig(**{name: value})


@pytest.mark.parametrize("name", ["vocab_size", "d_model", "num_layers", "head_dim"])
def test_only_the_ffn_width_may_be_left_open(name):
    with pytest.raises(ValueError, match=f"^{name} must be a positive integer, but is None"):
        ModelConfig(**{name: None})
    assert ModelConfig(ffn_dim=None).ffn_dim is None


@pytest.mark.parametrize(
    ("mixer", "name", "value"),
    [
        ("rwkv7", "decay_rank", 0),
        ("rwkv7", "iclr_rank", -32),
        ("rwkv7", "value_rank", 1.5),
        ("rwkv7", "gate_rank", "32"),
        ("rwkv7", "gate_rank", True),
        ("rwkv7", "group_norm_eps", -1e-5),
        ("rwkv7", "group_norm_eps", "tiny"),
        ("rwkv6", "shift_rank", 0),
        ("rwkv6", "decay_rank", None),
        ("rwkv6", "group_norm_eps", float("nan")),
        ("linear_transformer", "eps", -1.0),
        ("linear_transformer", "eps", float("inf")),
        ("attention", "rotary_base", 0.0),
        ("attention", "rotary_base", None),
    ],
)
def test_options_out_of_range_are_refused_by_name(mixer, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a positive "):
        from_dict({"mixer": mixer, "options": {name: value}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "there is no mixer None"),
        ({"mixer": "rwkv9"}, "there is no mixer 'rwkv9'; choose one of attention, "),
        ({"mixer": ["rwkv7"]}, "there is no mixer"),
        ({"mixer": "rwkv7", "options": None}, "must be a table of settings"),
        ({"mixer": "rwkv7", "options": [1]}, "must be a table of settings"),
        ([], "must be a table of settings"),
        ("rwkv7", "must be a table of settings"),
        ({"mixer": "rwkv7", "d_model": 100}, "d_model must be a multiple of head_dim, but 100"),
        ({"mixer": "attention", "head_dim": 1}, "rotary positions need an even head_dim, not 1"),
        ({"mixer": "attention", "options": {"score": "hard"}}, "attention knows no score 'hard'"),
        ({"mixer": "attention", "options": {"score": ["tanh"]}}, "attention knows no score "),
        ({"mixer": "attention", "options": {"state": ["cache"]}}, "state must be one of cache, "),
    ],
)
def test_what_cannot_be_built_is_refused(values, message):
    with pytest.raises(ValueError, match=message) as error:
        from_dict(values)
    assert "\n" not in str(error.value)


def test_an_unknown_mixer_and_options_of_another_are_refused():
    with pytest.raises(ValueError, match="there is no mixer 'rwkv9'"):
        LanguageModel(ModelConfig(mixer="rwkv9"))
    with pytest.raises(ValueError, match="rwkv7 takes RWKV7Options, but options is RWKV6Options"):
        LanguageModel(ModelConfig(mixer="rwkv7", options=RWKV6Options()))


def test_a_config_cannot_be_changed():
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 8


def test_parse_mixer():
    for name in MIXERS:
        assert parse_mixer(name) == (name, MIXERS[name].time_mix.Options())
    assert parse_mixer("softmax") == ("attention", AttentionOptions(score="softmax"))
    for score in SCORES:
        assert parse_mixer(f"attention:{score}") == ("attention", AttentionOptions(score=score))
    assert parse_mixer("attention:polynomial:2") == parse_mixer(
        "attention:score=polynomial:order=2"
    )
    for name, options in {
        "polynomial": AttentionOptions(score="polynomial", order=3),
        "polynomial:2": AttentionOptions(score="polynomial", order=2),
        "polynomial:constant": AttentionOptions(score="polynomial", order=3, state="constant"),
        "polynomial:2:constant": AttentionOptions(score="polynomial", order=2, state="constant"),
        "polynomial:constant:2": AttentionOptions(score="polynomial", order=2, state="constant"),
        "entmax": AttentionOptions(score="entmax", alpha=1.5),
        "entmax:1.3": AttentionOptions(score="entmax", alpha=1.3),
        "entmax:2": AttentionOptions(score="entmax", alpha=2.0),
        "square_l1:cache": AttentionOptions(score="square_l1"),
        "square_l1:constant": AttentionOptions(score="square_l1", state="constant"),
        "relu_l1:sum_eps=0.01": AttentionOptions(score="relu_l1", sum_eps=0.01),
    }.items():
        assert parse_mixer(f"attention:{name}") == ("attention", options)
    assert parse_mixer("rwkv7:gate_rank=64:first_value_residual") == (
        "rwkv7",
        RWKV7Options(gate_rank=64, first_value_residual=True),
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "there is no mixer ''; choose one of attention, "),
        ("RWKV7", "there is no mixer 'RWKV7'"),
        (":softmax", "there is no mixer ':softmax'"),
        ("softmax:softmax", "there is no mixer 'softmax:softmax'"),
        ("rwkv7:softmax", "rwkv7:softmax: 'softmax' is no option of this mixer; it takes group_n"),
        ("rwkv7:gate_rank", "'gate_rank' is no option of this mixer"),
        ("rwkv7:gate_rank=", "has nothing after|gate_rank must be a whole number, but is ''"),
        ("rwkv7:gate_rank=many", "gate_rank must be a whole number, but is 'many'"),
        ("rwkv7:gate_rank=0", "gate_rank must be a positive integer, but is 0"),
        ("rwkv7:first_value_residual=1", "first_value_residual must be true or false"),
        ("attention:hard", "attention knows no score 'hard'; choose one of softmax"),
        ("attention:softmax:hard", "'hard' is no option of this mixer"),
        ("attention:softmax:2", "'2' is no option of this mixer"),
        ("attention:softmax:constant", "a constant state needs .* with softmax leave it out"),
        ("attention:entmax:constant", "a constant state needs square_l1, taylor or polynomial"),
        ("attention:polynomial:4:constant", "with polynomial of order 4 leave it out"),
        ("attention:polynomial:5", "order of polynomial must be 1, 2, 3 or 4, but is 5"),
        ("attention:polynomial:0", "order must be a positive integer, but is 0"),
        ("attention:polynomial:1.5", "order must be a whole number, but is '1.5'"),
        ("attention:polynomial:2:3", "order is given twice"),
        ("attention:entmax:1", "alpha of entmax must be above 1 and at most 2, but is 1.0"),
        ("attention:entmax:2.5", "alpha of entmax must be above 1 and at most 2, but is 2.5"),
        ("attention:tanh:order=2", "order is of the score polynomial, not tanh"),
        ("attention:polynomial:alpha=1.5", "alpha is of the score entmax, not polynomial"),
        ("attention:softmax:sum_eps=0.1", "sum_eps is of the score square_l1 or relu_l1 or"),
        ("attention:square_l1:sum_eps=0", "sum_eps must be a positive number, but is 0.0"),
        ("attention:tanh:state=none", "state must be one of cache, constant, but is 'none'"),
    ],
)
def test_parse_mixer_refuses(name, message):
    with pytest.raises(ValueError, match=message):
        parse_mixer(name)


@pytest.mark.parametrize("name", ["rwkv7:", "attention:"])
def test_parse_mixer_refuses_a_colon_with_nothing_after_it(name):
    with pytest.raises(ValueError, match="after the colon"):
        parse_mixer(name)


@pytest.mark.parametrize("mixer", ALL_MIXERS)
@pytest.mark.parametrize("size", sorted(SIZES))
def test_presets_build(size, mixer):
    """On the meta device: shapes without memory or time."""
    config = preset(size, mixer, vocab_size=257)
    shape = SIZES[size]
    layers = shape.num_layers * (1 if MIXERS[mixer].channel_mix else 2)
    assert dataclasses.astuple(shape) == (shape.num_layers, config.d_model, config.head_dim)
    assert config.num_layers == layers
    model = shapes_only(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight.shape == (257, shape.d_model)
    assert len(model.blocks) == layers
    assert model.num_parameters() > 2 * 257 * shape.d_model


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_a_preset_runs(mixer):
    torch.manual_seed(0)
    model = LanguageModel(preset("nano", mixer, vocab_size=300, ffn_dim=96))
    assert model.config.ffn_dim == 96
    logits = model(torch.arange(20)[None]).logits
    assert logits.shape == (1, 20, 300)
    assert torch.isfinite(logits).all()


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="there is no size 'huge'; choose one of nano, micro, "):
        preset("huge", "rwkv7", vocab_size=257)
