"""RWKV-4 agrees with the one of `transformers`, whole and step by step."""

import pytest
import torch
from model_helpers import FORMS, assert_close, random_model, random_tokens
from peer_helpers import expect_every_weight_to_show, expect_logits, expect_steps

from model.config import ModelConfig
from model.pretrained import to_official

VOCAB, TIME, PREFILL = 300, 210, 200
RENAMED = {
    "emb.weight": "embeddings.weight",
    ".att.": ".attention.",
    ".ffn.": ".feed_forward.",
    ".ln0.": ".pre_ln.",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}


def their_name(official):
    for old, new in RENAMED.items():
        official = official.replace(old, new)
    return official if official == "head.weight" else f"rwkv.{official}"


@pytest.fixture(scope="module", params=[(2, 64, None), (3, 96, 160)], ids=str)
def pair(request):
    """The same random weights in both."""
    from transformers import RwkvConfig, RwkvForCausalLM

    layers, width, ffn_dim = request.param
    config = ModelConfig("rwkv4", VOCAB, width, layers, head_dim=16, ffn_dim=ffn_dim)
    model = random_model(config, dtype=torch.float32)
    peer = RwkvForCausalLM(
        RwkvConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=ffn_dim,
            rescale_every=0,
        )
    ).eval()
    official = to_official(model.config, model.state_dict())
    peer.load_state_dict({their_name(name): x for name, x in official.items()}, strict=True)
    return model, peer


@pytest.mark.parametrize("form", FORMS)
def test_logits_agree(pair, form):
    model, peer = pair
    expect_logits(model, peer, random_tokens(2, TIME, vocab=VOCAB), form)


def test_logits_and_state_agree_step_by_step(pair):
    """Their state: token before in channel and time mix, numerator, denominator, largest logit."""
    model, peer = pair
    tokens = random_tokens(1, TIME, seed=1, vocab=VOCAB)  # their step mixes up the rows of a batch
    state, theirs = expect_steps(
        model, peer, tokens, PREFILL, lambda output: {"state": output.state}
    )
    for layer, block in enumerate(state):
        own = (block.channel.shift, block.time.shift, *block.time.mean)
        for found, expected in zip(own, theirs["state"], strict=True):
            assert_close(found, expected[:, :, layer], 1e-4)


@torch.no_grad()
def test_the_comparison_would_see_every_weight(pair):
    model, peer = pair
    tokens = random_tokens(1, TIME, vocab=VOCAB)
    expect_every_weight_to_show(model, peer(input_ids=tokens).logits, tokens)
