"""The learning rate over the steps."""

import math

SCHEDULES = ("cosine", "wsd")
DECAY_SHARE = 0.2
"""The part of the steps that `wsd` decays over: a fifth did as well as any in arXiv 2405.18392."""


def rate_factor(
    step: int, *, steps: int, warmup: int, final_fraction: float, schedule: str = "cosine"
) -> float:
    """The factor on the peak rate, in (0, 1]: a linear warm-up, and then one of `SCHEDULES`.

    `cosine` falls all the way (SGDR, arXiv 1608.03983). `wsd` (warm-up, stable, decay: MiniCPM,
    arXiv 2404.06395) stays at the peak and falls over the last fifth, along `1 - sqrt`
    (arXiv 2405.18392).

    Args:
        step: counted from 0.
        steps: in all.
        warmup: steps until the peak.
        final_fraction: what the last step comes near.
        schedule: which.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "wsd":
        decay = max(1, round(DECAY_SHARE * steps))
        begin = max(warmup, steps - decay)
        done = min(max(step - begin, 0) / max(steps - begin, 1), 1.0)
        share = 1 - math.sqrt(done)
    else:
        assert schedule == "cosine"
        done = (step - warmup) / max(steps - warmup, 1)
        share = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return final_fraction + (1 - final_fraction) * share
