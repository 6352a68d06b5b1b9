"""What the comparisons with models of `transformers` share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.language_model import LanguageModel
from model.state import ModelState


@torch.no_grad()
def expect_logits(model: LanguageModel, peer: nn.Module, tokens: Tensor, form: str) -> None:
    """The same logits, of which there is something to see."""
    logits = model(tokens, form=form).logits
    assert logits.std() > 0.5
    assert (logits - peer(input_ids=tokens).logits).abs().max() < 1e-4


@torch.no_grad()
def expect_steps(
    model: LanguageModel,
    peer: nn.Module,
    tokens: Tensor,
    prefill: int,
    carried: Callable[[Any], dict[str, Any]],
) -> tuple[ModelState, dict[str, Any]]:
    """The same logits at the prefill and at each token after it.

    `carried` makes of the peer's output what is to be given to it with the next token. Returned is
    what both carry after the last one.
    """
    theirs = peer(input_ids=tokens[:, :prefill], use_cache=True)
    logits, state = model(tokens[:, :prefill])
    assert (logits - theirs.logits).abs().max() < 1e-4
    for t in range(prefill, tokens.shape[1]):
        token = tokens[:, t : t + 1]
        theirs = peer(input_ids=token, use_cache=True, **carried(theirs))
        logits, state = model(token, state, form="recurrent")
        assert (logits - theirs.logits).abs().max() < 1e-4
    return state, carried(theirs)


@torch.no_grad()
def expect_every_weight_to_show(model: LanguageModel, expected: Tensor, tokens: Tensor) -> None:
    """No parameter's part in the logits is so small that an error in it would go unseen."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # what RWKV-7's first layer carries and nothing uses
            continue
        kept = parameter.clone()
        parameter.add_(0.05 * torch.randn_like(parameter))
        logits = model(tokens).logits
        parameter.copy_(kept)
        assert (logits - expected).abs().max() > 1e-3, name
