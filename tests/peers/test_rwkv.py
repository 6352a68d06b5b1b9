"""RWKV-6 and RWKV-7 agree with the `rwkv` package, which is written by RWKV's authors.

It reads its environment when it is imported and chooses its class by it: one process a version.
The state of its RWKV-7 is `[V, K]`, ours is `[K, V]`; in its RWKV-6 it is `[K, V]` too.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import assert_close, random_model, random_tokens

from model.config import ModelConfig
from model.language_model import LanguageModel

VOCAB = 300
PREFILL, STEPS = 120, 8
SHAPES = [(1, 64), (2, 128), (3, 192)]
"""Layers and width, at RWKV's head size of 64."""

WORKER = """
import sys
import warnings
from pathlib import Path

import torch

warnings.simplefilter("ignore")
from rwkv.model import RWKV

torch.set_num_threads(1)
folder, prefill = Path(sys.argv[1]), int(sys.argv[2])
for weights in sorted(folder.glob("*.pth")):
    tokens = torch.load(weights.with_suffix(".tokens")).tolist()
    peer = RWKV(model=str(weights.with_suffix("")), strategy="cpu fp32")
    logits, state = peer.forward(tokens[:prefill], None, full_output=True)
    rows = [logits]
    middle = [part.clone() for part in state]
    for token in tokens[prefill:]:
        logits, state = peer.forward([token], state)
        rows.append(logits[None])
    found = {"logits": torch.cat(rows), "middle": middle, "last": state}
    torch.save(found, weights.with_suffix(".found"))
"""

RWKV7_ATTENTION = {
    "w0": "decay.bias",
    "w1": "decay.down",
    "w2": "decay.up",
    "a0": "iclr.bias",
    "a1": "iclr.down",
    "a2": "iclr.up",
    "v0": "value_residual.bias",
    "v1": "value_residual.down",
    "v2": "value_residual.up",
    "g1": "gate.down",
    "g2": "gate.up",
    "k_k": "removal_scale",
    "k_a": "iclr_scale",
    "r_k": "bonus",
}
RWKV6_ATTENTION = {
    "time_maa_x": "mix_base",
    "time_maa_w1": "mix_down",
    "time_maa_w2": "mix_up",
    "time_decay": "decay.bias",
    "time_decay_w1": "decay.down",
    "time_decay_w2": "decay.up",
    "time_faaaa": "bonus",
    "gate.weight": "gate.weight",
}
COMMON_ATTENTION = {
    **{f"{name}.weight": f"{name}.weight" for name in ("receptance", "key", "value", "output")},
    "ln_x.weight": "head_norm.weight",
    "ln_x.bias": "head_norm.bias",
}
ATTENTION = {"rwkv6": RWKV6_ATTENTION, "rwkv7": RWKV7_ATTENTION}
MIX_ROWS = {"rwkv6": ("time_maa_", "wkvrg"), "rwkv7": ("x_", "rwkvag")}
CHANNEL_MIX = {
    "rwkv6": {
        "time_maa_k": "mix_key",
        "time_maa_r": "mix_receptance",
        "key.weight": "key.weight",
        "value.weight": "value.weight",
        "receptance.weight": "receptance.weight",
    },
    "rwkv7": {"x_k": "mix_key", "key.weight": "key.weight", "value.weight": "value.weight"},
}


def official_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Our weights under the names and in the shapes of an official checkpoint; none is left out."""
    mixer, ours = model.config.mixer, dict(model.state_dict())
    names = {"emb.weight": "embedding.weight", "head.weight": "head.weight"}
    for kind in ("weight", "bias"):
        names |= {
            f"blocks.0.ln0.{kind}": f"embedding_norm.{kind}",
            f"ln_out.{kind}": f"norm.{kind}",
        }
    for layer in range(model.config.num_layers):
        block = f"blocks.{layer}"
        for kind in ("weight", "bias"):
            names[f"{block}.ln1.{kind}"] = f"{block}.time_norm.{kind}"
            names[f"{block}.ln2.{kind}"] = f"{block}.channel_norm.{kind}"
        for official, own in {**COMMON_ATTENTION, **ATTENTION[mixer]}.items():
            if not (layer == 0 and own.startswith("value_residual")):
                names[f"{block}.att.{official}"] = f"{block}.time_mix.{own}"
        for official, own in CHANNEL_MIX[mixer].items():
            names[f"{block}.ffn.{official}"] = f"{block}.channel_mix.{own}"
    official = {name: ours.pop(own) for name, own in names.items()}
    prefix, order = MIX_ROWS[mixer]
    for layer in range(model.config.num_layers):
        rows = ours.pop(f"blocks.{layer}.time_mix.mix")
        for letter, row in zip(order, rows, strict=True):
            official[f"blocks.{layer}.att.{prefix}{letter}"] = row.clone()
    assert not ours, f"left out: {sorted(ours)}"
    if mixer == "rwkv7":  # the first layer carries them and nothing uses them
        for name in ("v0", "v1", "v2"):
            official[f"blocks.0.att.{name}"] = torch.full((1,), torch.nan)
    return {
        name: x.view(1, 1, -1) if x.dim() == 1 and ".ln" not in name and "ln_" not in name else x
        for name, x in official.items()
    }


@pytest.fixture(scope="module", params=["rwkv6", "rwkv7"])
def pairs(request, tmp_path_factory):
    """For every shape, our model, the tokens, and what the package made of them."""
    mixer, folder = request.param, tmp_path_factory.mktemp(request.param)
    models = {}
    for index, (layers, width) in enumerate(SHAPES):
        config = ModelConfig(
            mixer=mixer,
            vocab_size=VOCAB,
            num_layers=layers,
            d_model=width,
            head_dim=64,
        )
        model = random_model(config, seed=index, dtype=torch.float32)
        with torch.no_grad():  # quiet enough that the eps of the norm after it shows
            for block in model.blocks:
                block.time_mix.receptance.weight.mul_(0.05)
        tokens = random_tokens(1, PREFILL + STEPS, seed=index, vocab=VOCAB)
        torch.save(official_weights(model), folder / f"{index}.pth")
        torch.save(tokens[0], folder / f"{index}.tokens")
        models[layers, width] = model, tokens
    environment = {
        **os.environ,
        "RWKV_V7_ON": "1" if mixer == "rwkv7" else "0",
        "RWKV_JIT_ON": "0",
        "RWKV_CUDA_ON": "0",
    }
    # it appends the suffix itself, in RWKV-7 even to a path that has it
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder), str(PREFILL)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        shape: (*models[shape], torch.load(Path(folder) / f"{index}.found"))
        for index, shape in enumerate(SHAPES)
    }


def expect_state(model, state, parts):
    """Three tensors a layer: the token before in the time mix, the matrix, that in channel mix."""
    for layer, block in enumerate(state):
        time, matrix, channel = parts[3 * layer : 3 * layer + 3]
        if model.config.mixer == "rwkv7":
            matrix = matrix.transpose(-1, -2)
        assert_close(block.time.shift[0], time, 1e-4)
        assert_close(block.time.matrix[0], matrix, 1e-4)
        assert_close(block.channel.shift[0], channel, 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
@torch.no_grad()
def test_logits_and_state_agree(pairs, shape, form):
    model, tokens, found = pairs[shape]
    logits, state = model(tokens[:, :PREFILL], form=form)
    expect_state(model, state, found["middle"])
    rest, state = model(tokens[:, PREFILL:], state, form=form)
    expect_state(model, state, found["last"])
    logits = torch.cat([logits, rest], dim=1)[0]
    assert logits.std() > 0.5
    assert (logits - found["logits"]).abs().max() < 1e-4


@torch.no_grad()
def test_the_comparison_would_see_every_weight(pairs):
    """No parameter's part in the logits is so small that an error in it would go unseen."""
    model, tokens, found = pairs[2, 128]
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.add_(0.05 * torch.randn_like(parameter))
        logits = model(tokens).logits[0]
        parameter.copy_(kept)
        assert (logits - found["logits"]).abs().max() > 1e-3, name


@torch.no_grad()
def test_the_comparison_would_see_another_eps(pairs):
    """It is in no checkpoint, so only agreement with the official code can tell."""
    model, tokens, found = pairs[2, 128]
    options = dataclasses.replace(model.config.options, group_norm_eps=1e-5)
    other = LanguageModel(dataclasses.replace(model.config, options=options))
    other.load_state_dict(model.state_dict())
    assert (other(tokens).logits[0] - found["logits"]).abs().max() > 1e-3
