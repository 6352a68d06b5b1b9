"""Our softmax baseline agrees with the Llama of `transformers`, whole and with a KV cache."""

import pytest
import torch
from model_helpers import FORMS, random_model, random_tokens, small_config
from peer_helpers import expect_every_weight_to_show, expect_logits, expect_steps

VOCAB, TIME = 300, 100
NAMES = {
    "input_layernorm": "time_norm",
    "post_attention_layernorm": "channel_norm",
    "self_attn.q_proj": "time_mix.query",
    "self_attn.k_proj": "time_mix.key",
    "self_attn.v_proj": "time_mix.value",
    "self_attn.o_proj": "time_mix.output",
    "mlp.gate_proj": "channel_mix.gate",
    "mlp.up_proj": "channel_mix.up",
    "mlp.down_proj": "channel_mix.down",
}


@pytest.fixture(scope="module", params=[(2, 128, 32), (3, 192, 64)], ids=str)
def pair(request):
    """The same random weights in both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, head_dim = request.param
    config = small_config(
        "attention", vocab_size=VOCAB, num_layers=layers, d_model=width, head_dim=head_dim
    )
    model = random_model(config, dtype=torch.float32)
    ours = dict(model.state_dict())
    names = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }
    for layer in range(layers):
        for theirs, own in NAMES.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blocks.{layer}.{own}.weight"
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=ours["blocks.0.channel_mix.up.weight"].shape[0],
            num_hidden_layers=layers,
            num_attention_heads=width // head_dim,
            num_key_value_heads=width // head_dim,
            head_dim=head_dim,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    peer.load_state_dict({theirs: ours.pop(own) for theirs, own in names.items()}, strict=True)
    assert not ours
    return model, peer


@pytest.mark.parametrize("form", FORMS)
def test_logits_agree(pair, form):
    model, peer = pair
    expect_logits(model, peer, random_tokens(2, TIME, vocab=VOCAB), form)


def test_logits_agree_step_by_step_with_a_cache(pair):
    model, peer = pair
    tokens = random_tokens(2, TIME, seed=1, vocab=VOCAB)
    expect_steps(model, peer, tokens, 90, lambda output: {"cache": output.past_key_values})


@torch.no_grad()
def test_the_comparison_would_see_every_weight(pair):
    model, peer = pair
    tokens = random_tokens(1, TIME, vocab=VOCAB)
    expect_every_weight_to_show(model, peer(input_ids=tokens).logits, tokens)
