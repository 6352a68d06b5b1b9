"""The loss of the next token, without holding the logits of a whole batch at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.language_model import LanguageModel
from model.state import ModelState

BLOCK = 2**22
"""Logits in memory at a time: 16 MB in float32."""


def next_token_loss(
    model: LanguageModel,
    inputs: Tensor,
    targets: Tensor,
    reset: Tensor | None = None,
    state: ModelState | None = None,
) -> Tensor:
    """As `loss_and_state`, the loss alone."""
    return loss_and_state(model, inputs, targets, reset, state)[0]


def loss_and_state(
    model: LanguageModel,
    inputs: Tensor,
    targets: Tensor,
    reset: Tensor | None = None,
    state: ModelState | None = None,
) -> tuple[Tensor, ModelState]:
    """Mean of `-ln p(target)` over all tokens, in at least float32, and the state after them.

    Args:
        model: which predicts.
        inputs: `[B, T]` int64.
        targets: `[B, T]` int64, the token after each.
        reset: `[B, T]` bool, True where a token starts a document.
        state: to go on from; None to start afresh.
    """
    features, after = model.features(inputs, state, reset=reset)
    x, flat = features.flatten(0, 1), targets.flatten()
    if torch.is_autocast_enabled(x.device.type):
        return F.cross_entropy(model.head(x).float(), flat), after
    loss: Tensor = _LinearCrossEntropy.apply(x, model.head.weight, flat)  # type: ignore[no-untyped-call]  # torch's
    return loss, after


class _LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy(x W^T, targets)`, block by block, with the gradients formed on the way.

    The logits of a block become its gradient in place and are gone before the next: none is
    computed twice. (PyTorch's own chunked `linear_cross_entropy` takes several times as long on a
    CPU.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """X `[N, D]`, weight `[V, D]`, targets `[N]` -> a scalar."""
        count, vocab_size = x.shape[0], weight.shape[0]
        has_gradient = any(ctx.needs_input_grad)
        for_x, for_weight = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        rows = max(1, BLOCK // vocab_size)
        blocks = (torch.split(tensor, rows) for tensor in (x, targets, for_x))
        for part, wanted, for_part in zip(*blocks, strict=True):
            logits = part @ weight.T
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted[:, None])).sum(dtype=torch.float64)
            if has_gradient:
                share = logits.sub_(log_sum).exp_()
                share.scatter_add_(1, wanted[:, None], share.new_full((len(wanted), 1), -1.0))
                share.mul_(1.0 / count)
                torch.mm(share, weight, out=for_part)
                for_weight.addmm_(share.T, part)
        if has_gradient:
            ctx.save_for_backward(for_x, for_weight)
        return (total / count).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of x and weight; the gradient of a loss is nearly always 1."""
        for_x, for_weight = ctx.saved_tensors
        return for_x * gradient, for_weight * gradient, None
