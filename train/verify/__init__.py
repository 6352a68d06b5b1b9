"""The proof as a product: every form of every mixer against its definition in float64.

from train.verify import verify

report = verify(MyMixer)
assert report.ok, report.worst.sentence()
"""

from collections.abc import Callable

import torch

from train.verify.proof import Cell, Report, prove
from train.verify.targets import Target, subjects_of

__all__ = ["Cell", "Report", "Target", "verify"]

MODES = ("quick", "full")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def verify(
    *targets: Target,
    mode: str = "quick",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    advance: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Report:
    """Checks every form against the recurrent one in float64.

    Args:
        targets: what to check; a mixer brings its op, its time mixer alone and a small model of it.
        mode: `quick` or `full`.
        dtypes: of float64, float32 and bfloat16; the last is only for the logits of models.
        advance: called with the situations done, those in all, and what is being checked.

    Raises:
        ValueError: for a target that does not exist or cannot be built, or an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, but is {mode!r}")
    if not targets or not set(dtypes) <= set(DTYPES) or not dtypes:
        raise ValueError("give at least one target, and dtypes of float64, float32 and bfloat16")
    full = mode == "full"
    subjects = {s.name: s for target in targets for s in subjects_of(target)}
    total, done = sum(len(s.situations(full=full)) for s in subjects.values()), 0
    cells = []
    for subject in subjects.values():

        def step(name: str = subject.name) -> None:
            nonlocal done
            done += 1
            advance(done, total, name)

        cells += prove(subject, dtypes, full=full, advance=step)
    return Report(cells)
