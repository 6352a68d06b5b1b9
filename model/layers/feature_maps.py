"""Feature maps: what makes of a dot product a weight that can be summed into a state.

Each is a pure function `[..., K] -> [..., F]`.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1`, positive everywhere (arXiv 2006.16236, equation 7)."""
    return F.elu(x) + 1.0


def monomials(x: Tensor, order: int) -> Tensor:
    """`phi(x) . phi(y) = (x . y)^order`: products of `order` channels, each set of channels once.

    The tensor power of x holds the same product at every arrangement of its factors; here it stands
    once, times the root of how many arrangements there are.

    Args:
        x: `[..., K]`.
        order: p, at least 1.

    Returns:
        `[..., F]`, F = `num_monomials(K, order)`.
    """
    channels, root = _sets_of_channels(x.shape[-1], order)
    products = x
    for place, own in enumerate(channels.to(x.device).unbind(-1)):
        factor = x.index_select(-1, own)
        products = products * factor if place else factor
    return products if order == 1 else products * root.to(x)


def num_monomials(key_dim: int, order: int) -> int:
    """F of `monomials`: K, K (K + 1) / 2 and K (K + 1) (K + 2) / 6 for the orders 1, 2 and 3."""
    return math.comb(key_dim + order - 1, order)


def taylor(x: Tensor) -> Tensor:
    """`phi(x) . phi(y) = 1 + s + s^2 / 2` with `s = x . y` (Based, arXiv 2402.18668).

    Args:
        x: `[..., K]`.

    Returns:
        `[..., F]`, F = `num_taylor(K)`.
    """
    return torch.cat([torch.ones_like(x[..., :1]), x, monomials(x, 2) / math.sqrt(2)], dim=-1)


def num_taylor(key_dim: int) -> int:
    """F of `taylor`: one constant, K and K (K + 1) / 2."""
    return 1 + key_dim + num_monomials(key_dim, 2)


@functools.cache
def _sets_of_channels(key_dim: int, order: int) -> tuple[Tensor, Tensor]:
    """`[F, order]`, ascending channels, and `[F]`, the root of the number of their arrangements.

    That number is order! over the product of c! for every channel that stands c times.
    """
    channels = torch.combinations(torch.arange(key_dim, device="cpu"), order, with_replacement=True)
    repeats = torch.ones_like(channels)  # how often this channel has stood so far
    for place in range(1, order):
        again = channels[:, place] == channels[:, place - 1]
        repeats[:, place] = torch.where(again, repeats[:, place - 1] + 1, 1)
    arrangements = math.factorial(order) / repeats.prod(dim=1).double()
    return channels, arrangements.sqrt()
