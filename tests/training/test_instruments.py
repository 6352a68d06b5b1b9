"""The instruments read what they say, from every mixer, and change nothing that is trained."""

import math

import pytest
import torch
from model_helpers import ALL_MIXERS, assert_close, random_model, random_tokens, resets_at
from model_helpers import small_config as config_of
from runs import TINY, ebb, metrics, only_line, repeatable

from data.loader import Batch
from data.tokenizers import byte_tokenizer
from model.language_model import LanguageModel
from model.layers.attention import AttentionOptions
from model.ops import OPS
from model.ops.scores import SCORES
from model.presets import preset
from model.state import tensors
from train import run_instruments
from train.heat_maps import heat_maps, save_attention_plot, sentence_of
from train.implied import (
    effective_rank,
    entropies,
    implied_attention,
    observe,
    row_shares,
    smallest_divisor,
    softmax_instead,
    spans,
)
from train.instrument_plots import save_layers_plot
from train.instruments import INSTRUMENTS, by_layer, parse_instruments, read_instruments

TIME = 13
CONSTANT = ("square_l1", "taylor", "polynomial")
RESETS = {"one document": (), "documents": ((0, 3), (1, 0), (1, 7), (1, 8))}


def attention(score, **options):
    options = AttentionOptions(score=score, **options)
    return random_model(config_of("attention", options=options))


def every_model():
    """Each mixer; and attention with each score, and in each of its ways."""
    found = {mixer: lambda mixer=mixer: random_model(config_of(mixer)) for mixer in ALL_MIXERS}
    found |= {score: lambda score=score: attention(score) for score in SCORES}
    found |= {
        f"{score}:constant": lambda score=score: attention(score, state="constant")
        for score in CONSTANT
    }
    return [pytest.param(make, id=name) for name, make in found.items()]


def make_batch(places=()):
    tokens = random_tokens(2, TIME + 1)
    reset = resets_at(2, TIME, places) if places else None
    return Batch(tokens[:, :-1], tokens[:, 1:], reset)


def observed_layers(model, places=()):
    batch = make_batch(places)
    return list(observe(model, batch.inputs, batch.reset))


@pytest.mark.parametrize("make_model", every_model())
@pytest.mark.parametrize("places", RESETS.values(), ids=RESETS)
def test_implied_attention_times_values_is_the_output(make_model, places):
    """Of the recurrent form, which is the definition, in every layer."""
    layers = observed_layers(make_model(), places)
    assert len(layers) == 3
    for observed in layers:
        matrix, v = implied_attention(observed), observed.arguments["v"]
        expected, _ = OPS[observed.op].recurrent(**observed.arguments)
        equation = "bhij,bjhv->bihv" if v.dim() == 4 else "bdij,bjd->bid"
        assert_close(torch.einsum(equation, matrix, v), expected, 1e-9)
        assert not matrix.triu(1).any()
        assert matrix[0, :, 5, :3].any() == (not places)  # a document begins at token 3


@pytest.mark.parametrize("score", CONSTANT)
def test_a_constant_state_implies_the_matrix_of_the_cache(score):
    for cache, constant in zip(
        observed_layers(attention(score)),
        observed_layers(attention(score, state="constant")),
        strict=True,
    ):
        assert constant.op == "additive"
        assert_close(implied_attention(constant), implied_attention(cache), 1e-9)


def literal_scores(observed, row, head):
    """The scores `[T, T]` of one head, later tokens at -inf."""
    q, k = (observed.arguments[name][row, :, head] for name in ("q", "k"))
    scores = observed.arguments.get("scale", 1.0) * q @ k.T
    return scores.masked_fill(torch.ones(TIME, TIME, dtype=torch.bool).triu(1), -torch.inf)


def test_the_figures_of_softmax_are_those_of_its_attention_matrix():
    """Computed here one number after the other, as the definitions say."""
    model = random_model(config_of("attention"))
    rows = by_layer(read_instruments(model, make_batch(), ["attention"]))
    for row, observed in zip(rows, observed_layers(model), strict=True):
        norms, entropy, span = [], [], []
        for text in range(2):
            for head in range(4):
                weights = literal_scores(observed, text, head).softmax(-1).tolist()
                norms.append(math.sqrt(sum(w * w for line in weights for w in line)))
                for i, line in enumerate(weights):
                    entropy.append(-sum(w * math.log(w) for w in line if w))
                    span.append(sum(w * (i - j) for j, w in enumerate(line)))
        for name, values in (
            ("attention_norm", norms),
            ("attention_entropy", entropy),
            ("attention_span", span),
        ):
            assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-5), name
        assert row["attention_norm"] <= math.sqrt(TIME)
        assert "smallest_divisor" not in row


def test_softmax_instead_is_softmax_of_the_same_queries_and_keys():
    for mixer, heads in (("gla", 4), ("mamba2", 8)):
        observed = observed_layers(random_model(config_of(mixer)))[0]
        matrix = implied_attention(softmax_instead(observed))
        shared = observed.arguments["q"].shape[2]
        assert matrix.shape[1] == observed.arguments["v"].shape[2]
        head = matrix.shape[1] - 1
        expected = literal_scores(observed, 1, head * shared // matrix.shape[1]).softmax(-1)
        assert_close(matrix[1, head], expected, 1e-9, f"{mixer}, {heads} heads")
    assert softmax_instead(observed_layers(random_model(config_of("rwkv4")))[0]) is None


FUNCTIONS = {
    "square_l1": lambda s: s * s,
    "relu_l1": lambda s: max(s, 0.0),
    "sigmoid_l1": lambda s: 1 / (1 + math.exp(-s)),
    "softplus_l1": lambda s: math.log1p(math.exp(s)),
    "taylor": lambda s: 1 + s + s * s / 2,
    "softpick": lambda s: abs(math.exp(s) - 1),
    "linear_transformer": lambda s: s,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_smallest_divisor(name):
    model = random_model(config_of(name)) if name in ALL_MIXERS else attention(name)
    for observed in observed_layers(model):
        sums = [
            sum(FUNCTIONS[name](s) for s in line if s > -math.inf)
            for row in range(2)
            for head in range(4)
            for line in literal_scores(observed, row, head).tolist()
        ]
        assert smallest_divisor(observed) == pytest.approx(min(sums), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("score", ["square_l1", "taylor"])
def test_smallest_divisor_of_a_constant_state(score):
    """In features, which cancel: less exact where the sum is small."""
    cache = observed_layers(attention(score))[2]
    constant = observed_layers(attention(score, state="constant"))[2]
    assert smallest_divisor(constant) == pytest.approx(smallest_divisor(cache), rel=1e-6, abs=1e-12)


def test_entropy_span_and_rank_of_known_matrices():
    uniform = torch.ones(4, 4, dtype=torch.float64).tril()
    shares = row_shares(-3 * uniform)  # neither size nor sign count
    logs = torch.tensor([1, 2, 3, 4], dtype=torch.float64).log()
    torch.testing.assert_close(entropies(shares), logs)
    torch.testing.assert_close(spans(shares), torch.tensor([0, 0.5, 1, 1.5], dtype=torch.float64))
    assert row_shares(torch.zeros(2, 2)).isnan().all()
    outer = torch.outer(torch.arange(1.0, 6.0), torch.arange(2.0, 5.0)).double()
    assert effective_rank(outer).item() == pytest.approx(1.0)
    assert effective_rank(5 * torch.eye(7, dtype=torch.float64)).item() == pytest.approx(7.0)


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_state_is_that_of_the_model(mixer):
    """After the last token; and after a part of the text, that of the part."""
    model, batch = random_model(config_of(mixer)), make_batch()
    found = read_instruments(model, batch, ["states"])
    if mixer == "attention":
        assert found == {}
        return
    whole = f".token{TIME}"
    for count, detail in ((TIME, ""), (TIME, whole), (TIME // 2, f".token{TIME // 2}")):
        _, state = model.features(batch.inputs[:, :count])
        for layer, (_, matrix) in enumerate(_matrices(state)):
            if mixer == "linear_transformer":
                matrix = matrix[..., :-1]
            norm = matrix.square().sum(dim=(-2, -1)).sqrt().mean().item()
            assert found[f"state_norm.layer{layer}{detail}"] == pytest.approx(norm, rel=1e-5)
            if mixer != "rwkv4":
                rank = effective_rank(matrix).mean().item()
                assert found[f"state_rank.layer{layer}{detail}"] == pytest.approx(rank, rel=1e-5)


def _matrices(state):
    """The matrix of each layer; of rwkv4 the weighted mean."""
    if "0.time.mean.num" in (found := dict(tensors(state))):
        means = [found[f"{i}.time.mean.num"] / found[f"{i}.time.mean.den"] for i in range(3)]
        return [(str(i), mean[:, None, None]) for i, mean in enumerate(means)]
    return [(name, x) for name, x in found.items() if name.endswith("time.matrix")]


def test_half_lives_of_retnet_by_head():
    found = read_instruments(random_model(config_of("retnet")), make_batch(), ["decays"])
    for layer in range(3):
        lives = [math.log(0.5) / math.log(1 - 2.0 ** (-5 - head)) for head in range(4)]
        heads = [found.pop(f"half_life.layer{layer}.head{head}") for head in range(4)]
        assert heads == pytest.approx(lives, rel=1e-5)
        assert found.pop(f"half_life.layer{layer}") == pytest.approx(lives[1], rel=1e-5)
    assert found == {}


def test_half_lives_of_channels_are_medians_of_their_head():
    model = random_model(config_of("rwkv6"))
    found = read_instruments(model, make_batch(), ["decays"])
    log_decay = observed_layers(model)[1].arguments["log_decay"]  # [B, T, H, K]
    for head in range(4):
        median = (math.log(0.5) / log_decay[:, :, head]).median().item()
        assert found[f"half_life.layer1.head{head}"] == pytest.approx(median, rel=1e-5)


def test_gradient_norms_are_those_of_a_backward_pass():
    model, batch = random_model(config_of("rwkv7")), make_batch(((0, 4),))
    before = torch.get_rng_state()
    found = read_instruments(model, batch, ["gradients"])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    logits = model(batch.inputs, reset=batch.reset).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    for layer, block in enumerate(model.blocks):
        squares = [p.grad.square().sum().item() for p in block.parameters() if p.grad is not None]
        norm = math.sqrt(sum(squares))
        assert found[f"gradient_norm.layer{layer}"] == pytest.approx(norm, rel=1e-5)
    norm = model.head.weight.grad.norm().item()
    assert found["gradient_norm.head"] == pytest.approx(norm, rel=1e-5)


def test_what_is_not_finite_is_left_out():
    observed_half_life = read_instruments(
        random_model(config_of("linear_transformer")), make_batch(), ["decays"]
    )
    assert observed_half_life == {}
    model = attention("relu_l1")
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.query.weight.zero_()  # all scores 0: no weights at all
    found = read_instruments(model, make_batch(), ["attention"])
    assert found["attention_norm.layer0"] == 0.0
    assert found["smallest_divisor.layer0"] == 0.0
    assert "attention_entropy.layer0" not in found


def test_only_a_small_part_of_a_large_batch_is_read():
    model, tokens = random_model(config_of("gla")), random_tokens(5, 300)
    large = read_instruments(model, Batch(tokens, tokens, None), INSTRUMENTS)
    part = tokens[:2, :256]
    assert large == read_instruments(model, Batch(part, part, None), INSTRUMENTS)


def test_names():
    assert parse_instruments("all") == INSTRUMENTS
    assert parse_instruments("decays, attention") == ("attention", "decays")
    with pytest.raises(ValueError, match="there is no instrument 'heads'; choose of attention"):
        parse_instruments("attention,heads")


@pytest.fixture(scope="module")
def plain_and_read(workshop):
    """The same run without instruments and with all of them."""
    flags = ["--data", workshop / "text.txt", *TINY, "--mixer", "rwkv7", "--sample-every", "0"]
    flags += ["--steps", "4", "--eval-every", "2", "--log-every", "1", "--dropout", "0.1"]
    plain, read = workshop / "plain", workshop / "read"
    assert ebb("train", *flags, "--out", plain) == 0
    assert ebb("train", *flags, "--out", read, "--instruments", "all") == 0
    return plain, read


def test_training_is_the_same_bit_for_bit(plain_and_read):
    plain, read = plain_and_read
    for name in ("model.safetensors", "best.safetensors"):
        assert (read / name).read_bytes() == (plain / name).read_bytes()
    names = {name for line in repeatable(plain) for name in line}
    common = [{k: v for k, v in line.items() if k in names} for line in repeatable(read)]
    assert common == repeatable(plain)


def test_readings_stand_beside_the_validation_loss(plain_and_read):
    _, read = plain_and_read
    for line in metrics(read):
        names = {name.partition(".")[0] for name in line if ".layer" in name}
        expected = {"attention_norm", "attention_entropy", "attention_span", "state_norm"}
        expected |= {"state_rank", "half_life", "gradient_norm"}
        assert names == (expected if "validation_loss" in line else set())
    for name in ("attention.png", "instruments.png"):
        assert (read / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_installed_or_read_where_no_instrument_is_on(workshop, monkeypatch):
    flags = ["--data", workshop / "text.txt", *TINY, "--mixer", "gla", "--sample-every", "0"]
    flags += ["--steps", "2", "--eval-every", "1"]
    calls = {"passes": 0, "observed": 0, "hooks": 0, "read": 0}
    features, read = LanguageModel.features, run_instruments.read_instruments

    def counted(self, tokens, state=None, form="chunked", reset=None, observe=None):
        calls["passes"] += 1
        calls["observed"] += observe is not None
        calls["hooks"] += sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in self.modules()
        )
        return features(self, tokens, state, form, reset, observe)

    def counted_read(*args):
        calls["read"] += 1
        return read(*args)

    monkeypatch.setattr(LanguageModel, "features", counted)
    monkeypatch.setattr(run_instruments, "read_instruments", counted_read)
    assert ebb("train", *flags, "--out", workshop / "off") == 0
    assert calls["passes"] >= 4
    assert calls == {"passes": calls["passes"], "observed": 0, "hooks": 0, "read": 0}
    assert not list((workshop / "off").glob("*.png"))
    assert ebb("train", *flags, "--out", workshop / "on", "--instruments", "decays") == 0
    assert calls["read"] == 2
    assert calls["observed"] >= 2
    assert calls["hooks"] == 0


def test_a_resumed_run_may_switch_them_on(plain_and_read, workshop, capsys):
    plain, _ = plain_and_read
    assert ebb("train", "--resume", "--out", plain, "--instruments", "gradients") == 0
    assert ebb("train", "--out", workshop / "none", "--instruments", "heads") == 2
    assert "there is no instrument 'heads'" in only_line(capsys.readouterr().err)


def test_a_plot_of_nothing_and_of_little(tmp_path):
    """A run may have been read once, or with some of the instruments, or never."""
    sizes = []
    for found in (
        {},
        {"half_life.layer0": 3.0},
        {"smallest_divisor.layer0": 0.0, "gradient_norm.layer1": 2.0, "state_norm.layer0": 1.0},
    ):
        save_layers_plot([], found, tmp_path / "plot.png")
        sizes.append(len((tmp_path / "plot.png").read_bytes()))
    assert sizes == sorted(sizes)
    early = {"tokens": 9, "attention_norm.layer0": 2.0, "attention_norm.sqrt_tokens": 4.0}
    late = {"tokens": 18, "half_life.layer0": 3.0}
    for history in ([early, late], [early, early | {"tokens": 12}, late]):
        save_layers_plot(history, late, tmp_path / "plot.png")  # resumed with others switched on
    save_attention_plot([], tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()


def test_heat_maps_show_the_shares_of_the_mean_head():
    """Up to four layers from the first to the last; a row sums to 1; later tokens are 0."""
    model = LanguageModel(preset("nano", "rwkv4", 257))
    (maps,) = heat_maps(model, byte_tokenizer(), "a $tate\n\u4f60")
    assert maps.words[:9] == [*"a $tate", "↵", "·"]
    assert [*maps.layers] == [0, 1, 2, 3]
    for matrix in maps.layers.values():
        assert_close(matrix.sum(-1), torch.ones(len(maps.words), dtype=torch.float64), 1e-9)
        assert not matrix.triu(1).any()
    assert heat_maps(model, byte_tokenizer(), "a", softmax=True) == []


def test_sentence():
    text = "Yes. The state of the union is strong.\nAnd so it goes on and on."
    assert sentence_of(text) == "The state of the union is strong."
    assert sentence_of("word " * 40) == " ".join(["word"] * 25)


def test_a_score_tells_its_divisor_where_it_divides():
    """So that a new score that divides by a sum is not forgotten."""
    for name, score in SCORES.items():
        always_large = name in ("softmax", "entmax", "sparsemax")
        divides = score.eps > 0 or score.normalizes
        assert (score.divisor is not None) == (divides and not always_large), name
