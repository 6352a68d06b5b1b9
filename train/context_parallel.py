"""Sequences longer than one process holds: each process reads a stretch, the state is passed on.

A recurrent model knows of all tokens before a stretch what is in its state. So a process receives
each block's state from the process that reads the stretch before its own, and sends the state after
its own stretch to the one behind it. Backwards the gradient of the state takes the same way back.
While a process is busy with block n, the one before it is busy with block n + 1.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.language_model import LanguageModel
from model.state import ModelState, map_tensors, tensors


class _Receive(torch.autograd.Function):
    """A state from another process; backwards, its gradient is sent there.

    `x` only passes through: it hangs the exchange into the order of the other operations, which is
    the same in every process, so that no two of them wait for each other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: int, *like: Tensor) -> tuple[Tensor, ...]:
        """X of any shape, and tensors of the shapes to receive -> x, and what was received."""
        ctx.source = source
        ctx.has_gradient = [tensor.is_floating_point() for tensor in like]
        received = [torch.empty_like(tensor).contiguous() for tensor in like]
        for tensor in received:
            dist.recv(tensor, src=source)
        ctx.mark_non_differentiable(*(t for t in received if not t.is_floating_point()))
        return (x.view_as(x), *received)

    @staticmethod
    def backward(ctx: Any, for_x: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the received state go where it came from."""
        for gradient, is_wanted in zip(gradients, ctx.has_gradient, strict=True):
            if is_wanted:
                dist.send(gradient.contiguous(), dst=ctx.source)
        return (for_x, None, *(None for _ in gradients))


class _Send(torch.autograd.Function):
    """A state for another process; backwards, its gradient comes from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: int, *state: Tensor) -> Tensor:
        """X of any shape, and what to send -> x."""
        ctx.target = target
        ctx.like = [tensor.detach() if tensor.is_floating_point() else None for tensor in state]
        for tensor in state:
            dist.send(tensor.contiguous(), dst=target)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, for_x: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the sent state."""
        gradients: list[Tensor | None] = []
        for like in ctx.like:
            gradient = None
            if like is not None:
                gradient = torch.empty_like(like).contiguous()
                dist.recv(gradient, src=ctx.target)
            gradients.append(gradient)
        return (for_x, None, *gradients)


def pass_states(model: LanguageModel, source: int | None, target: int | None) -> None:
    """Makes every block begin with the state of one process and hand its own to another.

    Args:
        model: whose forward passes are given initial states, for the shapes.
        source: rank that reads the stretch before; None for the first stretch.
        target: rank that reads the stretch behind; None for the last one.
    """

    def receive(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, state, context = args
        like = [tensor for _, tensor in tensors(state)]
        x, *received = _Receive.apply(x, source, *like)  # type: ignore[no-untyped-call]  # torch's
        parts = iter(received)
        return x, map_tensors(lambda _: next(parts), state), context

    def send(block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> Any:
        y, state = output
        # The receiver's buffers have the types of the initial state, whatever autocast did here.
        pairs = zip(tensors(state), tensors(args[1]), strict=True)
        sent = [tensor.to(like.dtype) for (_, tensor), (_, like) in pairs]
        return _Send.apply(y, target, *sent), state  # type: ignore[no-untyped-call]  # torch's

    for block in model.blocks:
        if source is not None:
            block.register_forward_pre_hook(receive)
        if target is not None:
            block.register_forward_hook(send)


def check_constant(state: ModelState, mixer: str) -> None:
    """Refuses a state that grows with the tokens.

    Raises:
        ValueError: for a cache of keys and values.
    """
    if _grows(state):
        raise ValueError(
            f"context-parallel passes on a state of constant size, but that of {mixer} grows with "
            "the tokens: leave it out, or choose a recurrent mixer"
        )


def _grows(state: Any) -> bool:
    """Whether a part of it needs its own way to be concatenated."""
    if isinstance(state, Tensor):
        return False
    return hasattr(state, "concatenate") or any(map(_grows, state))
