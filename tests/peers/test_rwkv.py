"""RWKV-4, 5.2, 6 and 7 agree with the `rwkv` package, which is written by RWKV's authors.

Through real files: `ebb convert` writes the checkpoint that the package reads, and what is compared
is the model that `ebb convert` makes of that file.

The package reads its environment when it is imported and chooses its class by it: one process a
version. The state of its RWKV-7 is `[V, K]`, ours is `[K, V]`; in its RWKV-5 and 6 it is `[K, V]`.
"""

import dataclasses
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from model_helpers import assert_close, random_model, random_tokens
from peer_helpers import expect_every_weight_to_show
from runs import ebb

from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers.rwkv6 import RWKV6Options
from model.layers.rwkv7 import RWKV7Options
from train import checkpoint

VOCAB = 300
PREFILL, STEPS = 200, 8


class Shape(NamedTuple):
    layers: int
    width: int
    head_dim: int
    ffn_dim: int | None = None
    """None for the official multiple."""


SHAPES = [Shape(1, 64, 64), Shape(2, 128, 64, 200), Shape(3, 96, 32, 96), Shape(2, 80, 16)]
MIDDLE = SHAPES[1]
OPTIONS = {
    "rwkv6": RWKV6Options(shift_rank=8, decay_rank=12),
    "rwkv7": RWKV7Options(decay_rank=8, iclr_rank=12, value_rank=20, gate_rank=24),
}
"""Other ranks than the official ones, which the first shape has."""

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


def run_of(folder, mixer, index, shape):
    """The folder of a run with a random model."""
    config = ModelConfig(
        mixer=mixer,
        vocab_size=VOCAB,
        num_layers=shape.layers,
        d_model=shape.width,
        head_dim=shape.head_dim,
        ffn_dim=shape.ffn_dim,
        options=OPTIONS.get(mixer) if index else None,
    )
    model = random_model(config, seed=index, dtype=torch.float32)
    if mixer != "rwkv4":
        with torch.no_grad():  # quiet enough that the eps of the norm after it shows
            for block in model.blocks:
                block.time_mix.receptance.weight.mul_(0.05)
    folder.mkdir()
    checkpoint.save_json(folder / "config.json", {"model": model.config.to_dict(), "train": {}})
    checkpoint.save_weights(folder / "model.safetensors", model.state_dict())
    return folder


@pytest.fixture(scope="module", params=["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def pairs(request, tmp_path_factory):
    """For every shape, our model, the tokens, and what the package made of them."""
    mixer, folder = request.param, tmp_path_factory.mktemp(request.param)
    models = {}
    for index, shape in enumerate(SHAPES):
        run = run_of(folder / f"run {index}", mixer, index, shape)
        weights, back = folder / f"{index}.pth", folder / f"back {index}"
        assert ebb("convert", run, weights) == 0
        assert ebb("convert", weights, back) == 0
        tokens = random_tokens(1, PREFILL + STEPS, seed=index, vocab=VOCAB)
        torch.save(tokens[0], folder / f"{index}.tokens")
        models[shape] = checkpoint.load_model(back)[0], tokens
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
        shape: (*models[shape], torch.load(folder / f"{index}.found"))
        for index, shape in enumerate(SHAPES)
    }


def expect_state(model, state, parts):
    """What each layer has in both: the token before in time and channel mix, and its memory."""
    mixer = model.config.mixer
    parts_a_layer = 5 if mixer == "rwkv4" else 3
    assert len(parts) == parts_a_layer * len(state)
    for layer, block in enumerate(state):
        time, *memory, channel = parts[parts_a_layer * layer :][:parts_a_layer]
        own = block.time.mean if mixer == "rwkv4" else [block.time.matrix]
        if mixer == "rwkv7":
            memory = [memory[0].transpose(-1, -2)]
        for found, expected in zip(
            [block.time.shift, *own, block.channel.shift], [time, *memory, channel], strict=True
        ):
            assert_close(found[0], expected, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


def test_the_comparison_would_see_every_weight(pairs):
    model, tokens, found = pairs[MIDDLE]
    expect_every_weight_to_show(model, found["logits"], tokens)


@torch.no_grad()
def test_the_comparison_would_see_another_eps(pairs):
    """It is in no checkpoint, so only agreement with the official code can tell."""
    model, tokens, found = pairs[MIDDLE]
    if model.config.mixer == "rwkv4":
        assert not dataclasses.fields(model.config.options)
        return
    options = dataclasses.replace(model.config.options, group_norm_eps=1e-5)
    other = LanguageModel(dataclasses.replace(model.config, options=options))
    other.load_state_dict(model.state_dict())
    assert (other(tokens).logits[0] - found["logits"]).abs().max() > 1e-3
