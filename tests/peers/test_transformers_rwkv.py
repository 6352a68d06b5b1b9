"""RWKV-4 agrees with the one of `transformers`, whole and step by step."""

import pytest
import torch
from model_helpers import FORMS, assert_close, random_model, random_tokens

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
@torch.no_grad()
def test_logits_agree(pair, form):
    model, peer = pair
    tokens = random_tokens(2, TIME, vocab=VOCAB)
    expected = peer(input_ids=tokens).logits
    logits = model(tokens, form=form).logits
    assert logits.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_logits_and_state_agree_step_by_step(pair):
    """Their state: token before in channel and time mix, numerator, denominator, largest logit."""
    model, peer = pair
    tokens = random_tokens(1, TIME, seed=1, vocab=VOCAB)  # their step mixes up the rows of a batch
    theirs = peer(input_ids=tokens[:, :PREFILL], use_cache=True)
    logits, state = model(tokens[:, :PREFILL])
    assert (logits - theirs.logits).abs().max() < 1e-4
    for t in range(PREFILL, TIME):
        token = tokens[:, t : t + 1]
        theirs = peer(input_ids=token, state=theirs.state, use_cache=True)
        logits, state = model(token, state, form="recurrent")
        assert (logits - theirs.logits).abs().max() < 1e-4
    for layer, block in enumerate(state):
        own = (block.channel.shift, block.time.shift, *block.time.mean)
        for found, expected in zip(own, theirs.state, strict=True):
            assert_close(found, expected[:, :, layer], 1e-4)


@torch.no_grad()
def test_the_comparison_would_see_every_weight(pair):
    model, peer = pair
    tokens = random_tokens(1, TIME, vocab=VOCAB)
    expected = peer(input_ids=tokens).logits
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.add_(0.05 * torch.randn_like(parameter))
        logits = model(tokens).logits
        parameter.copy_(kept)
        assert (logits - expected).abs().max() > 1e-3, name
