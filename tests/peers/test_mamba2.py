"""Our mamba2 agrees with the one of `transformers`, whole and step by step with its cache."""

import pytest
import torch
from model_helpers import FORMS, assert_close, random_model, random_tokens
from peer_helpers import expect_every_weight_to_show, expect_logits, expect_steps

from model.config import ModelConfig
from model.layers.mamba2 import Mamba2Options

VOCAB, TIME, PREFILL = 300, 210, 200
MIXER = {
    "in_proj.weight": "input.weight",
    "conv1d.weight": "convolution.taps",
    "conv1d.bias": "convolution.bias",
    "dt_bias": "step_bias",
    "A_log": "decay_rate",
    "D": "skip",
    "norm.weight": "norm.weight",
    "out_proj.weight": "output.weight",
}


@pytest.fixture(
    scope="module", params=[(2, 64, 16, 32, 2, 4), (3, 48, 24, 20, 1, 3), (2, 32, 8, 16, 3, 2)]
)
def pair(request):
    """The same random weights in both."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    layers, width, head_dim, state_size, expand, conv_size = request.param
    # one group: their gated norm falls into groups where there are several, ours, as Mamba-2's own
    # code by default, does not
    options = Mamba2Options(state_size=state_size, expand=expand, groups=1, conv_size=conv_size)
    config = ModelConfig("mamba2", VOCAB, width, layers, head_dim, options=options)
    model = random_model(config, dtype=torch.float32)
    ours = dict(model.state_dict())
    names = {
        "backbone.embeddings.weight": "embedding.weight",
        "backbone.norm_f.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }
    for layer in range(layers):
        theirs, own = f"backbone.layers.{layer}", f"blocks.{layer}"
        names[f"{theirs}.norm.weight"] = f"{own}.time_norm.weight"
        for name, own_name in MIXER.items():
            names[f"{theirs}.mixer.{name}"] = f"{own}.time_mix.{own_name}"
    weights = {theirs: ours.pop(own) for theirs, own in names.items()}
    assert not ours
    for name in weights:
        if name.endswith("conv1d.weight"):  # theirs: [D, 1, size], the token's own tap last
            weights[name] = weights[name].flip(0).T[:, None]
    peer = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=width,
            num_hidden_layers=layers,
            num_heads=expand * width // head_dim,
            head_dim=head_dim,
            state_size=state_size,
            expand=expand,
            conv_kernel=conv_size,
            n_groups=1,
            layer_norm_epsilon=1e-6,
            time_step_limit=(0.0, float("inf")),
            chunk_size=32,
            tie_word_embeddings=False,
        )
    ).eval()
    peer.load_state_dict(weights, strict=True)
    return model, peer


@pytest.mark.parametrize("form", FORMS)
def test_logits_agree(pair, form):
    model, peer = pair
    expect_logits(model, peer, random_tokens(2, TIME, vocab=VOCAB), form)


def test_logits_and_state_agree_step_by_step(pair):
    model, peer = pair
    tokens = random_tokens(2, TIME, seed=1, vocab=VOCAB)
    state, theirs = expect_steps(
        model, peer, tokens, PREFILL, lambda output: {"cache": output.cache}
    )
    for layer, block in enumerate(state):
        matrix = theirs["cache"].get_recurrent_state(layer, state_idx=0)
        assert_close(block.time.matrix, matrix.transpose(-1, -2), 1e-4)


@torch.no_grad()
def test_the_comparison_would_see_every_weight(pair):
    model, peer = pair
    tokens = random_tokens(1, TIME, vocab=VOCAB)
    expect_every_weight_to_show(model, peer(input_ids=tokens).logits, tokens)
