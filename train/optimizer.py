"""The optimisers: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from model.initialization import parameter_groups
from model.language_model import LanguageModel
from train.recipes import Recipe

TOGETHER = 2**22
"""Numbers that Muon turns at a time: gathered from other processes, they are 16 MB in float32."""


def make_optimizer(
    model: LanguageModel,
    recipe: Recipe,
    learning_rate: float,
    weight_decay: float,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """One of `train.config.OPTIMIZERS` over the model's own parameter groups.

    AdamW (arXiv 1711.05101) runs in one fused pass.
    """
    groups = parameter_groups(model, learning_rate, weight_decay)
    if name == "adamw":
        return _adamw(groups, recipe)
    assert name == "muon"
    hidden = {id(weight) for weight in _hidden_matrices(model)}
    apart = [
        [
            {**group, "params": chosen}
            for group in groups
            if (chosen := [p for p in group["params"] if (id(p) in hidden) is is_hidden])
        ]
        for is_hidden in (True, False)
    ]
    return MuonWithAdamW(Muon(apart[0], adjust_lr_fn="match_rms_adamw"), _adamw(apart[1], recipe))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate to its own multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, with the iteration in float32 on a CPU, and for many matrices at once.

    PyTorch's own rounds to bfloat16, which takes a hundred times as long on a CPU without units for
    it. Where the step has its products rounded, so has the iteration.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's is untyped
        """The same update as PyTorch's; small matrices of one shape in one call."""
        assert closure is None, "a step is taken with the gradients that are there"
        for group in self.param_groups:
            assert group["nesterov"]
            assert group["adjust_lr_fn"] == "match_rms_adamw"
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                count = max(1, TOGETHER // shape.numel())
                for first in range(0, len(weights), count):
                    self._apply(weights[first : first + count], group)
        return None

    def _apply(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """The step of weights of one shape, which are turned together."""
        updates = [self._update(weight, group["momentum"]) for weight in weights]
        whole = torch.stack([x.full_tensor() if isinstance(x, DTensor) else x for x in updates])
        whole = orthogonalized(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for weight, update, turned in zip(weights, updates, whole.unbind(), strict=True):
            if isinstance(update, DTensor):  # every process has all of it and takes its rows
                mesh, placements = update.device_mesh, update.placements
                turned = distribute_tensor(turned, mesh, placements, src_data_rank=None)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(turned, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))

    def _update(self, weight: Tensor, momentum: float) -> Tensor:
        """The gradient, averaged as Nesterov's momentum has it."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum)


def orthogonalized(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """`U V^T` of each matrix `U S V^T`, roughly: all singular values come near 1.

    Newton-Schulz: each step applies `a s + b s^3 + c s^5` to every singular value s (Jordan 2024,
    kellerjordan.github.io/posts/muon). On a GPU it works in bfloat16, as PyTorch does, elsewhere in
    the precision of the matrices, with its products as the step has them.

    Args:
        matrices: `[B, M, N]`, of any scale.
        coefficients: a, b, c.
        steps: how often.
        eps: the least norm to divide by.
    """
    a, b, c = coefficients
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if (is_tall := x.shape[1] > x.shape[2]) else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers in one: it shows the groups of both, and saves and loads both."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__(list(chain.from_iterable(part.param_groups for part in parts)), {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        """Lets the parts work on the groups and the state that are shown."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's is untyped
        """A step of each."""
        assert closure is None, "a step is taken with the gradients that are there"
        for part in self.parts:
            part.step()
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `state_dict` gave it."""
        super().load_state_dict(state_dict)
        self._share()


def _adamw(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, fused=True)


def _hidden_matrices(model: LanguageModel) -> list[torch.nn.Parameter]:
    """The weights of linear layers inside the blocks: neither embedding nor head."""
    return [
        parameter
        for name, parameter in model.blocks.named_parameters()
        if name.endswith(".weight") and parameter.dim() == 2
    ]
