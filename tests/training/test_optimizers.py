"""Muon beside AdamW: what it does to a matrix, which parameters it has, and that it resumes."""

import shutil

import pytest
import torch
from model_helpers import random_model, random_tokens, small_config
from runs import TINY, ebb

from model.language_model import LanguageModel
from model.layers import MIXERS
from train import optimizer as optimizer_module
from train.loss import next_token_loss
from train.optimizer import Muon, make_optimizer, orthogonalized, set_rate
from train.recipes import recipe_of
from train.snapshot import Snapshot, load_snapshot, save_snapshot

JORDAN = (3.4445, -4.7750, 2.0315)


def muon_of(mixer, model=None):
    model = model or LanguageModel(small_config(mixer))
    optimizer = make_optimizer(model, recipe_of(mixer), 5e-3, 0.1, "muon")
    return model, optimizer


def take_steps(model, optimizer, steps):
    for step in steps:
        set_rate(optimizer, 5e-3 / (1 + step))
        tokens = random_tokens(2, 9, seed=step)
        next_token_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (1, 30)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_come_near_one_and_vectors_stay(shape, scale):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    spread = torch.linspace(0.1, 1.0, len(values), dtype=torch.float64)
    (result,) = orthogonalized((scale * (u * spread) @ v)[None], JORDAN, 5, 1e-12)
    inside = u.T @ result @ v.T
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_update_is_that_of_pytorch_but_for_its_bfloat16(shape):
    start, settings = torch.randn(shape), {"lr": 0.02, "weight_decay": 0.1}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    own = Muon([ours], adjust_lr_fn="match_rms_adamw", **settings)
    peer = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        own.step()
        peer.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()
    torch.testing.assert_close(own.state[ours], peer.state[theirs])


@pytest.mark.parametrize("together", [1, 2 * 24 * 24, 2**22])
def test_matrices_that_are_turned_together_move_as_each_alone(monkeypatch, together):
    monkeypatch.setattr(optimizer_module, "TOGETHER", together)
    shapes = [(24, 24), (48, 16), (24, 24), (16, 48), (48, 16), (24, 24)]
    starts, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    joint, apart = ([torch.nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    optimizers = [Muon(joint, **settings), *(Muon([weight], **settings) for weight in apart)]
    for _ in range(2):
        for weights in (joint, apart):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
        joint[1].grad = apart[1].grad = None  # left out
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(joint, apart, starts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert torch.equal(one, start) == (one is joint[1])


def test_a_step_is_as_long_as_adams():
    """Which is why both take the same rate: 0.2 is the usual size of Adam's steps (2502.16982)."""
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    weight.grad = torch.randn(64, 32)
    optimizer.step()
    assert 0.1 < weight.detach().square().mean().sqrt() < 0.3


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_muon_has_the_matrices_inside_the_blocks_and_adamw_the_rest(mixer):
    model, optimizer = muon_of(mixer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = (
        [names[id(p)] for group in part.param_groups for p in group["params"]]
        for part in optimizer.parts
    )
    assert sorted(muon + adamw) == sorted(names.values())
    assert {"embedding.weight", "head.weight"} <= set(adamw)
    matrices = [name for name in muon if name.startswith("blocks.") and name.endswith(".weight")]
    assert matrices == muon
    assert any("output" in name for name in muon)
    plain = make_optimizer(model, recipe_of(mixer), 5e-3, 0.1)
    assert rates_and_decays(optimizer, names) == rates_and_decays(plain, names)


def rates_and_decays(optimizer, names):
    return {
        names[id(p)]: (group["lr"], group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_rate_of_both_is_set_at_once():
    _, optimizer = muon_of("rwkv7")
    set_rate(optimizer, 1e-4)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {1e-4, 2e-4}


@pytest.mark.parametrize("mixer", ["rwkv7", "attention"])
def test_saved_and_loaded_it_goes_on_with_the_same_bits(mixer, tmp_path):
    model, optimizer = muon_of(mixer)
    take_steps(model, optimizer, range(3))
    save_snapshot(tmp_path, Snapshot(3, model.state_dict(), optimizer.state_dict(), {}))
    snapshot = load_snapshot(tmp_path, pytest.fail)
    other = LanguageModel(small_config(mixer))
    other.load_state_dict(snapshot.weights)
    _, again = muon_of(mixer, other)
    again.load_state_dict(snapshot.optimizer)
    for pair in ((model, optimizer), (other, again)):
        take_steps(*pair, range(3, 6))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    count = sum(1 for _ in model.parameters())
    assert set(optimizer.state_dict()["state"]) == set(range(count))


def test_run_with_muon_and_dropout_resumes_to_the_same_bytes(workshop, tmp_path):
    run = ["train", "--data", workshop / "text.txt", *TINY, "--steps", "6", "--sample-every", "0"]
    run += ["--optimizer", "muon", "--dropout", "0.2", "--schedule", "wsd", "--save-every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert ebb(*run, "--out", whole) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "resume" / "step-000000006")
    (cut / "model.safetensors").write_bytes((cut / "best.safetensors").read_bytes()[:100])
    assert ebb("train", "--resume", "--out", cut) == 0
    for name in ("model.safetensors", "resume/step-000000006/optimizer.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_dropout_is_for_training_only_and_keeps_the_mean():
    model = random_model(small_config("attention"), dtype=torch.float32)
    tokens = random_tokens(1, 8)
    plain = model(tokens).logits
    model.set_dropout(0.5)
    model.train()
    torch.manual_seed(1)
    one = model(tokens).logits
    torch.manual_seed(1)
    assert torch.equal(one, model(tokens).logits)
    assert not torch.allclose(one, plain)
    assert torch.equal(model.eval()(tokens).logits, plain)
    model.train()
    block = model.blocks[0]
    ones = torch.ones(20_000)
    assert set(block._dropped(ones).tolist()) == {0.0, 2.0}
    assert block._dropped(ones).mean() == pytest.approx(1.0, abs=0.05)
