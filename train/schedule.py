"""The learning rate over the steps."""

import math


def rate_factor(step: int, *, steps: int, warmup: int, final_fraction: float) -> float:
    """Linear warm-up, then a cosine down to `final_fraction` (SGDR, arXiv 1608.03983).

    Args:
        step: counted from 0.
        steps: in all.
        warmup: steps until the peak.
        final_fraction: what the last step comes near.

    Returns:
        The factor on the peak rate, in (0, 1].
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
