"""What stands in the place of softmax: functions from one causal row of scores to its weights.

A row holds the scores `s_j = scale q_i . k_j` of all tokens that token i sees; t is how many.
Names and formulas: `SCORES`. A weight need not be positive, nor need a row sum to one.

Shape legend: B batch, H heads, R rows (query tokens), n row length with what is hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from entmax import entmax15, entmax_bisect
from entmax import sparsemax as entmax_sparsemax
from torch import Tensor

EPS = 1e-6
"""Added to the sums of weights that can be zero."""

Rule = Callable[[Tensor, Tensor], Tensor]
"""`(scores [B, H, R, n], visible [B or 1, 1, R, n] bool) -> weights [B, H, R, n]`."""


@dataclass(frozen=True)
class Score:
    """One way from scores to weights: call it with the scores and what of them is visible.

    Hidden entries get the weight 0 and no gradient, and change no other weight.
    """

    rule: Rule
    """Of scores whose hidden entries are `hidden`; what it says of those does not count."""
    equation: str
    """The weights of a row in one line."""
    source: str | None
    """The paper; None where there is none."""
    normalizes: bool
    """Whether the weights of a row sum to one, or would without eps."""
    eps: float = 0.0
    """What stands beside the sum in the denominator."""
    exact: bool = False
    """Whether a feature map makes the same of a state of constant size."""
    hidden: float = 0.0
    divisor: Rule | None = None
    """What the weights of a row are divided by, less `eps`, `[B, H, R, 1]`, where that can come
    near zero: a dangerous place, worth a look. None for other scores."""

    def __call__(self, scores: Tensor, visible: Tensor) -> Tensor:
        """The weights `[B, H, R, n]` of scores `[B, H, R, n]`; visible `[B or 1, 1, R, n]` bool."""
        return self.rule(scores.masked_fill(~visible, self.hidden), visible).masked_fill(
            ~visible, 0.0
        )


def polynomial_factor(order: int, length: Tensor) -> Tensor:
    """`c_t = 1 / sqrt((2p - 1)!! t)`, which gives a row of unit-normal scores weights of norm 1.

    The 2p-th moment of a unit-normal number is `(2p - 1)!! = 1 * 3 * ... * (2p - 1)`.

    Args:
        order: p.
        length: t, in the dtype of the weights.
    """
    return (math.prod(range(1, 2 * order, 2)) * length).rsqrt()


def polynomial(order: int = 3) -> Score:
    """`s^p c_t` (arXiv 2410.18613), p from 1 to 4; a state of constant size up to 3.

    Raises:
        ValueError: for another order.
    """
    if type(order) is not int or not 1 <= order <= 4:
        raise ValueError(f"the order of polynomial must be 1, 2, 3 or 4, but is {order!r}")

    def rule(scores: Tensor, visible: Tensor) -> Tensor:
        return scores**order * polynomial_factor(order, _length(visible, scores))

    return Score(
        rule,
        f"s^{order} / sqrt({math.prod(range(1, 2 * order, 2))} t)",
        "arXiv 2410.18613",
        normalizes=False,
        exact=order <= 3,
    )


def entmax(alpha: float = 1.5) -> Score:
    """`entmax_alpha(s)` (arXiv 1905.05702): many weights are exactly 0; alpha above 1, at most 2.

    Near 1 it is softmax; at 2 sparsemax. Beyond 2 its gradient has no bound.

    Raises:
        ValueError: for another alpha.
    """
    if type(alpha) not in (int, float) or not 1 < alpha <= 2:
        raise ValueError(f"the alpha of entmax must be above 1 and at most 2, but is {alpha!r}")

    def rule(scores: Tensor, visible: Tensor) -> Tensor:
        # In a row without a largest score there is no threshold to find: it becomes NaN.
        broken = ~scores.amax(dim=-1, keepdim=True).isfinite()
        rows = scores.masked_fill(broken, 0.0)
        weights: Tensor
        if alpha == 1.5:  # sorting finds the threshold exactly
            weights = entmax15(rows, dim=-1)
        elif alpha == 2:
            weights = entmax_sparsemax(rows, dim=-1)
        else:
            weights = entmax_bisect(rows, alpha=float(alpha), dim=-1)
        return weights.masked_fill(broken, torch.nan)

    return Score(
        rule,
        f"entmax_{alpha:g}(s): many are exactly 0",
        "arXiv 1905.05702",
        normalizes=True,
        hidden=-math.inf,
    )


def over_sum(name: str, eps: float = EPS) -> Score:
    """`f(s) / (sum f(s) + eps)`, f a row of `OVER_SUM`.

    Where all scores of a row can come near zero together, as with square_l1 and relu_l1, eps is
    what bounds the gradient: by about `1 / sqrt(eps)` and `1 / eps`.

    Raises:
        ValueError: for an eps that is not above zero.
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"the eps of {name} must be above 0, but is {eps}")
    f = name.removesuffix("_l1")
    equation = "s^2 / sum s^2" if name == "square_l1" else f"{f}(s) / sum {f}(s)"
    return Score(
        _over_sum(OVER_SUM[name], eps),
        equation,
        None,
        normalizes=True,
        eps=eps,
        exact=name == "square_l1",
        divisor=_sum_of(OVER_SUM[name]),
    )


def by_rows(function: Callable[[Tensor], Tensor]) -> Score:
    """The score of a function that knows nothing of masks: it gets exactly the visible scores.

    Rows of the batch that see the same places go into one call.

    Args:
        function: from `[rows, H, n]` to weights of the same shape, each row by itself.
    """

    def rule(scores: Tensor, visible: Tensor) -> Tensor:
        batch, _, count, places = scores.shape
        rows = scores.transpose(1, 2).flatten(0, 1)
        masks = visible.expand(batch, 1, count, places).flatten(0, 2)
        patterns, pattern_of = torch.unique(masks, dim=0, return_inverse=True)
        order = pattern_of.argsort()
        groups = torch.split(rows[order], pattern_of.bincount().tolist())
        weights = [
            _of_visible(function, group, mask) for group, mask in zip(groups, patterns, strict=True)
        ]
        in_place = torch.cat(weights)[order.argsort()]
        return in_place.view(batch, count, *in_place.shape[1:]).transpose(1, 2)

    return Score(rule, "a user's function", None, normalizes=False)


def _of_visible(function: Callable[[Tensor], Tensor], scores: Tensor, mask: Tensor) -> Tensor:
    """`[rows, H, n]` -> `[rows, H, n]`: the function's weights where the mask `[n]` is True."""
    seen = scores[..., mask]
    weights = function(seen)
    if not isinstance(weights, Tensor) or weights.shape != seen.shape:
        found = [*weights.shape] if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"a score must make weights of the same shape of scores {[*seen.shape]}, not {found}"
        )
    return torch.zeros_like(scores).masked_scatter(mask, weights.to(scores.dtype))


def _length(visible: Tensor, scores: Tensor) -> Tensor:
    """Of each row its t, `[B or 1, 1, R, 1]`, in the dtype of the scores."""
    return visible.sum(dim=-1, keepdim=True).to(scores.dtype)


def _over_sum(function: Callable[[Tensor], Tensor], eps: float) -> Rule:
    """`f(s) / (sum f(s) + eps)` for an f that is nowhere negative."""

    def rule(scores: Tensor, visible: Tensor) -> Tensor:
        weights = function(scores).masked_fill(~visible, 0.0)
        return weights / (weights.sum(dim=-1, keepdim=True) + eps)

    return rule


def _sum_of(function: Callable[[Tensor], Tensor]) -> Rule:
    """`sum f(s)` over what is visible, `[B, H, R, 1]`."""

    def divisor(scores: Tensor, visible: Tensor) -> Tensor:
        return function(scores).masked_fill(~visible, 0.0).sum(dim=-1, keepdim=True)

    return divisor


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.softmax(dim=-1)


def _tanh(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.tanh() / _length(visible, scores).sqrt()


def _sigmoid(scores: Tensor, visible: Tensor) -> Tensor:
    return (scores - _length(visible, scores).log()).sigmoid()


def _relu(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.relu() / _length(visible, scores)


def _relu_squared(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.relu().square() / _length(visible, scores)


def _taylor(scores: Tensor) -> Tensor:
    """Nowhere below 1/2."""
    return 1.0 + scores + 0.5 * scores.square()


def _softplus(scores: Tensor) -> Tensor:
    """`log(1 + e^s)`; PyTorch's own is s from 20 on, which is short of float64's digits."""
    return -F.logsigmoid(-scores)


def _softpick(scores: Tensor, visible: Tensor) -> Tensor:
    """Above and below the line times `exp(-m)`, m the largest score but at least 0.

    `|e^s - 1| e^-m` is formed as `(1 - e^-|s|) e^(relu(s) - m)`: no exponent is above 0, and
    scores near 0 keep their digits.
    """
    largest = scores.detach().amax(dim=-1, keepdim=True).clamp(min=0.0)
    size = -torch.expm1(-scores.abs()) * (scores.relu() - largest).exp()
    total = size.sum(dim=-1, keepdim=True) + EPS * (-largest).exp()
    return size.masked_fill(scores < 0, 0.0) / total


OVER_SUM: dict[str, Callable[[Tensor], Tensor]] = {
    "square_l1": torch.square,
    "relu_l1": torch.relu,
    "sigmoid_l1": torch.sigmoid,
    "softplus_l1": _softplus,
}
"""The f of the scores that divide by the sum of their row."""

SCORES = {
    "softmax": Score(
        _softmax, "e^s / sum e^s", "arXiv 1706.03762", normalizes=True, hidden=-math.inf
    ),
    **{name: over_sum(name) for name in OVER_SUM},
    "tanh": Score(_tanh, "tanh(s) / sqrt(t)", None, normalizes=False),
    "sigmoid": Score(_sigmoid, "sigmoid(s - log t)", "arXiv 2409.04431", normalizes=False),
    "relu": Score(_relu, "relu(s) / t", "arXiv 2309.08586", normalizes=False),
    "relu_squared": Score(_relu_squared, "relu(s)^2 / t", "arXiv 2309.08586", normalizes=False),
    "polynomial": polynomial(),
    "taylor": Score(
        _over_sum(_taylor, 0.0),
        "(1 + s + s^2/2) / sum",
        "arXiv 2402.18668",
        normalizes=True,
        exact=True,
        divisor=_sum_of(_taylor),
    ),
    "entmax": entmax(),
    "sparsemax": Score(
        entmax(2).rule,
        "the nearest point of the simplex to s",
        "arXiv 1602.02068",
        normalizes=True,
        hidden=-math.inf,
    ),
    "softpick": Score(
        _softpick,
        "relu(e^s - 1) / sum abs(e^s - 1)",
        "arXiv 2504.20966",
        normalizes=False,
        eps=EPS,
        divisor=_sum_of(lambda scores: torch.expm1(scores).abs()),
    ),
}
"""All scores by name, those with a parameter with its default: `polynomial` of order 3, `entmax` of
alpha 1.5. `_l1` stands for "over the sum of the row"."""


def find_score(score: str | Score | Callable[[Tensor], Tensor]) -> Score:
    """A row of `SCORES`, a `Score`, or any function from a row of visible scores to its weights.

    Raises:
        ValueError: for a name that does not exist, or what cannot be called.
    """
    if isinstance(score, Score):
        return score
    if isinstance(score, str) and score in SCORES:
        return SCORES[score]
    if isinstance(score, str) or not callable(score):
        raise ValueError(
            f"attention knows no score {score!r}; choose one of {', '.join(SCORES)}, "
            "or give a function from a row of scores to a row of weights"
        )
    return by_rows(score)
