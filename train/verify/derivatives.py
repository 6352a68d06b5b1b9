"""The definition's gradients against finite differences: a gradient that all forms have lost shows.

Every other check compares gradients with those of the recurrent form, which autograd makes.
"""

import torch
from torch import Tensor

from train.verify.running import Difference, Function, Inputs, all_tensors, flatten, map_tensors

STEPS = (1e-5, 1e-6)
"""Relative to the size of what is moved. The shorter is for trained models, whose outputs bend more
sharply than random ones'."""
TOLERANCE = 1e-6
"""Central differences in float64 are off by about 1e-10 from the step and as much from rounding."""
NEGLIGIBLE = 1e-3
"""Slopes are measured against this fraction of the steepest at least."""


def against_finite_differences(
    function: Function, inputs: Inputs, step: float = STEPS[0]
) -> Difference:
    """The largest error of the slope along one random direction of each input.

    Args:
        function: the recurrent form, in float64.
        inputs: what to give it, in float64.
        step: how far to move an input, relative to its size.
    """
    generator = torch.Generator().manual_seed(2)
    leaves = {
        name: map_tensors(lambda x: x.clone().requires_grad_(x.is_floating_point()), value)
        for name, value in inputs.items()
    }
    wanted = {name: x for name, x in all_tensors(leaves).items() if x.requires_grad}
    o, state = function(**leaves)
    results = {"o": o, **flatten("final_state", state)}
    cotangents = {
        name: torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for name, x in results.items()
        if x.is_floating_point()
    }

    def weighed(o: Tensor, state: object) -> Tensor:
        found = {"o": o, **flatten("final_state", state)}
        return torch.stack([(found[n] * c).sum() for n, c in cotangents.items()]).sum()

    gradients = torch.autograd.grad(weighed(o, state), [*wanted.values()], materialize_grads=True)
    slopes, sizes = {}, {}
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        size = x.detach().square().mean().sqrt().item() or 1.0  # what is a small step for x
        direction = size * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        with torch.no_grad():
            values = []
            for sign in (1.0, -1.0):
                x += sign * step * direction
                values.append(weighed(*function(**leaves)).item())
                x -= sign * step * direction
        measured = (values[0] - values[1]) / (2 * step)
        slopes[name] = (measured, (gradient * direction).sum().item())
        sizes[name] = max(abs(measured), size * gradient.norm().item())
    least = NEGLIGIBLE * max(sizes.values(), default=0.0)
    return max(
        (_compared(name, *slopes[name], max(sizes[name], least)) for name in slopes),
        key=lambda found: found.error,
    )


def _compared(name: str, measured: float, slope: float, size: float) -> Difference:
    error = abs(measured - slope) / size if size else 0.0
    return Difference(
        f"grad {name}",
        error,
        f"grad {name}: a slope of {slope:.6g} where finite differences measure {measured:.6g}",
    )
