"""The loss block by block: that of PyTorch, its gradients, and no more memory than a block."""

import pytest
import torch
import torch.nn.functional as F
from model_helpers import assert_close, random_model, random_tokens, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from train import loss as losses
from train.loss import next_token_loss


@pytest.mark.parametrize("block", [1, 29 * 7, 2**22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_value_and_gradients_are_those_of_the_whole(monkeypatch, block, dtype):
    """Blocks of one row, of seven (the last one shorter), and all at once."""
    monkeypatch.setattr(losses, "BLOCK", block)
    model = random_model(small_config("rwkv7"), dtype=dtype)
    tokens = random_tokens(2, 18)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    reset = torch.zeros(2, 17, dtype=torch.bool)
    reset[1, 5] = True
    logits = model(inputs, reset=reset).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    actual = next_token_loss(model, inputs, targets, reset)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(actual.detach(), expected.detach(), tolerance)
    parameters = list(model.parameters())
    pairs = zip(
        torch.autograd.grad(3.0 * actual, parameters),
        torch.autograd.grad(3.0 * expected, parameters),
        strict=True,
    )
    largest = 0.0
    found = list(pairs)
    largest = max(reference.abs().max().item() for _, reference in found)
    for ours, reference in found:
        assert_close(ours, reference, tolerance, least=largest)


def test_a_target_far_from_likely_and_large_logits_stay_finite():
    x = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    targets = torch.tensor([1, 1])
    loss = losses._LinearCrossEntropy.apply(x, weight, targets)
    assert loss.item() == pytest.approx(200.0)
    loss.backward()
    assert x.grad.flatten().tolist() == pytest.approx([1.0, 0.0])


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_the_logits_of_a_batch_are_never_there_at_once(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", 2**12)
    x, weight = torch.randn(512, 4, requires_grad=True), torch.randn(256, 4, requires_grad=True)
    targets = torch.randint(256, (512,))
    with Largest() as whole:
        F.cross_entropy(x @ weight.T, targets).backward()
    with Largest() as blocks:
        losses._LinearCrossEntropy.apply(x, weight, targets).backward()
    assert whole.numel == 512 * 256
    assert blocks.numel == 2**12
