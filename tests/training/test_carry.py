"""`--carry-state`: the state goes on from step to step, its gradient does not; resume is exact."""

import re
import signal

import numpy as np
import pytest
import torch
from model_helpers import ALL_MIXERS, random_model, random_tokens, small_config
from runs import TINY, ebb, has_logged, metrics, only_line, repeatable, start_ebb, wait_for
from safetensors.torch import load_file

from data.errors import DataError
from data.loader import StretchBatches
from model.state import detach, tensors
from train.carry import Carry
from train.loss import next_token_loss

RECURRENT = [mixer for mixer in ALL_MIXERS if mixer != "attention"]
STEPS = 31
CARRIED = ["--carry-state", "--sample-every", "0", "--log-every", "3", "--save-every", "4"]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("mixer", RECURRENT)
def test_stretches_give_the_loss_of_the_whole_and_a_truncated_gradient(mixer):
    model = random_model(small_config(mixer))
    tokens = random_tokens(2, 31)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    reset = torch.zeros_like(inputs, dtype=torch.bool)
    reset[1, 13] = True
    whole = next_token_loss(model, inputs, targets, reset)
    carry, losses = Carry(model.initial_state(1)), []
    for at in range(0, 30, 10):
        here = slice(at, at + 10)
        before = carry.tensors()
        assert not any(tensor.requires_grad for tensor in before.values())
        loss = carry.loss(model, inputs[:, here], targets[:, here], reset[:, here])
        losses.append(loss)
        carry.keep()
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-9, atol=1e-9)
    # Without the history of the first two stretches: the state is as good as a constant.
    _, state = model.features(inputs[:, :20], reset=reset[:, :20])
    constant = next_token_loss(model, inputs[:, 20:], targets[:, 20:], reset[:, 20:], detach(state))
    for found, expected in zip(
        gradients(model, losses[-1]), gradients(model, constant), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixer", RECURRENT)
def test_saved_and_restored_goes_on_alike(mixer):
    model = random_model(small_config(mixer))
    tokens = random_tokens(2, 21)
    carry, other, fresh = (Carry(model.initial_state(1)) for _ in range(3))
    carry.loss(model, tokens[:, :10], tokens[:, 1:11], None)
    assert carry.tensors() == {}, "a step that did not count has been carried"
    carry.keep()
    saved = carry.tensors()
    assert len(saved) == sum(1 for _ in tensors(model.initial_state(2)))
    other.restore(saved, torch.device("cpu"))
    fresh.restore({}, torch.device("cpu"))
    rest = (model, tokens[:, 10:20], tokens[:, 11:], None)
    assert torch.equal(carry.loss(*rest), other.loss(*rest))
    assert not torch.equal(carry.loss(*rest), fresh.loss(*rest))


def test_rows_go_on_where_they_ended_and_cover_the_text():
    for length, rows, context in ((1000, 4, 8), (97, 3, 32), (33, 2, 16), (38, 2, 6)):
        text = np.arange(length, dtype=np.uint16)
        batches = StretchBatches(text, context=context, batch_size=rows, seed=3, end_id=60_000)
        count = batches.steps_per_epoch
        assert length - 1 - count * rows * context < rows * context + context
        offsets = set()
        for epoch in range(4):
            steps = [batches[epoch * count + step] for step in range(count)]
            inputs = torch.cat([batch.inputs for batch in steps], dim=1)
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(count * context))
            assert torch.equal(inputs[1:, 0], inputs[:-1, -1] + 1)
            assert all(torch.equal(batch.targets, batch.inputs + 1) for batch in steps)
            assert steps[0].reset[:, 0].all()
            assert not steps[0].reset[:, 1:].any()
            assert all(batch.reset is None for batch in steps[1:])
            offsets.add(int(inputs[0, 0]))
        assert max(offsets) < context
    assert len({int(batches[epoch * count].inputs[0, 0]) for epoch in range(40)}) > 1
    with pytest.raises(DataError, match="33 tokens, fewer than 3 parts of one context of 16"):
        StretchBatches(text[:33], context=16, batch_size=3, seed=0, end_id=60_000)


def test_documents_reset_the_carried_state_too():
    text = np.array([1, 2, 9, 3, 4, 5, 6, 7, 9, 8, 1, 2, 3], dtype=np.uint16)
    batches = StretchBatches(text, context=3, batch_size=2, seed=0, end_id=9)
    seen = [batches[step] for step in range(batches.steps_per_epoch)]
    inputs = torch.cat([batch.inputs for batch in seen], dim=1)
    none = torch.zeros(2, 3, dtype=torch.bool)
    reset = torch.cat([none if batch.reset is None else batch.reset for batch in seen], dim=1)
    assert (inputs == 9).any()
    assert torch.equal(reset[:, 1:], inputs[:, 1:] == 9)


def test_interrupted_run_goes_on_exactly(workshop, tmp_path):
    flags = ["--data", workshop / "text.txt", *TINY, *CARRIED, "--steps", STEPS]
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert ebb("train", *flags, "--out", whole) == 0
    process = start_ebb("train", *flags, "--out", folder)
    wait_for(lambda: has_logged(folder, 2), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert 0 < int(re.search(r"Saved after step (\d+) of", error)[1]) < STEPS
    assert ebb("train", "--resume", "--out", folder) == 0
    assert repeatable(folder) == repeatable(whole)
    extra = f"resume/step-{STEPS:09d}/extra.safetensors"
    for name in ("model.safetensors", extra):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert any(name.startswith("carried.") for name in load_file(folder / extra))


def test_carrying_changes_what_is_learned_and_is_part_of_the_run(workshop, tmp_path, capsys):
    flags = ["--data", workshop / "text.txt", *TINY, "--steps", "6", "--sample-every", "0"]
    flags += ["--log-every", "1", "--mixer", "retnet"]
    assert ebb("train", *flags, "--carry-state", "--out", tmp_path / "carried") == 0
    assert ebb("train", *flags, "--out", tmp_path / "windows") == 0
    carried, windows = (metrics(tmp_path / name)[-1] for name in ("carried", "windows"))
    assert carried["validation_loss"] != windows["validation_loss"]
    capsys.readouterr()
    assert ebb("train", "--resume", "--carry-state", "--out", tmp_path / "windows") == 1
    assert "was made with carry-state False, not True" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("mixer", ["attention", "softmax", "attention:relu"])
def test_a_cache_that_grows_is_not_carried(workshop, tmp_path, capsys, mixer):
    flags = ["--data", workshop / "text.txt", *TINY, "--mixer", mixer, "--carry-state"]
    assert ebb("train", *flags, "--out", tmp_path / "run") in (1, 2)
    error = capsys.readouterr().err
    assert "carry-state needs a state of constant size" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    flags[flags.index(mixer)] = "attention:square_l1:constant"
    assert ebb("train", *flags, "--steps", "2", "--out", tmp_path / "constant") == 0
