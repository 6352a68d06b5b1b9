"""What a model is said to take: the rules by hand, and the measured peaks of memory."""

import re
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.language_model import LanguageModel
from model.presets import preset
from train.sizing import Machine, sizing, table

README = (Path(__file__).parents[2] / "train" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def nano():
    return sizing("nano", preset("nano", "rwkv7", 257))


def test_parameters_are_those_of_the_model(nano):
    model = LanguageModel(preset("nano", "rwkv7", 257))
    assert nano.parameters == sum(p.numel() for p in model.parameters())
    assert nano.parameters - nano.multiplied == 257 * 128


def test_operations_tokens_and_time_by_hand(nano):
    assert nano.tokens == 20 * nano.parameters
    assert nano.operations == 6 * nano.multiplied * 20 * nano.parameters
    machine = Machine("made up", devices=4, rate=1e12, used=0.25)
    assert nano.seconds(machine) == pytest.approx(nano.operations / 1e12)


def test_fixed_memory_is_what_an_optimizer_really_holds(nano):
    model = LanguageModel(preset("nano", "rwkv7", 257))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(1, 2, dtype=torch.long)
    model(tokens).logits.sum().backward()
    optimizer.step()
    held = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    found = sum(tensor.numel() * tensor.element_size() for tensor in held if tensor.dim() > 0)
    assert found == pytest.approx(nano.fixed_bytes(), rel=1e-3)
    assert nano.fixed_bytes(processes=4) == nano.fixed_bytes() / 4


def test_memory_agrees_with_the_measured_peaks():
    """The rows of train/README.md that were measured with 2,048 tokens a step."""
    shape = r"^\| rwkv7 \| (\d+) x (\d+) \| (\d+) \| [\d.]+ M"
    rows = re.findall(shape + r" \| (?:256|1k) \| \d \| .* (\d+) MB \|$", README, re.MULTILINE)
    assert rows
    for layers, width, vocab_size, megabytes in rows:
        config = ModelConfig(
            mixer="rwkv7",
            vocab_size=int(vocab_size),
            num_layers=int(layers),
            d_model=int(width),
            head_dim=64,
        )
        found = sizing("", config)
        total = found.fixed_bytes() + found.activation_bytes(2048)
        assert total / 1e6 == pytest.approx(float(megabytes), rel=0.15)


def test_the_table_of_the_readme_is_the_output_of_the_command():
    assert table() in README, "put the output of `python -m train.sizing` there"
