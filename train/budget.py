"""How much training: `500-steps`, `20M-tokens`, `1e15-flops` or `5min`."""

import math
import re
from dataclasses import dataclass
from typing import Self

_UNITS = {
    **{name: name for name in ("steps", "tokens", "flops")},
    **dict.fromkeys(("s", "min", "h"), "seconds"),
}
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@dataclass(frozen=True)
class Budget:
    """An amount of steps, tokens, floating-point operations or seconds."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `500-steps`, `20M-tokens`, `1e15-flops`, `90s`, `5min` or `1h`.

        Raises:
            ValueError: for anything else.
        """
        match = re.fullmatch(
            r"(\d+(?:\.\d+)?(?:e\d+)?)([kMGTP]?)-?(steps|tokens|flops|s|min|h)", text.strip()
        )
        amount = float(match[1]) * _FACTORS[match[2]] if match else 0.0
        if match is None or not 0 < amount < math.inf:
            raise ValueError(
                f"budget must be like 500-steps, 20M-tokens, 1e15-flops or 5min, but is {text!r}"
            )
        return cls(amount * _SECONDS.get(match[3], 1.0), _UNITS[match[3]])

    def steps(self, tokens_per_step: int, flops_per_token: float) -> int:
        """Whole optimiser steps that it pays for, at least one; not for a time."""
        assert self.unit in ("steps", "tokens", "flops")
        per_step = {
            "steps": 1.0,
            "tokens": float(tokens_per_step),
            "flops": tokens_per_step * flops_per_token,
        }
        return max(1, int(self.amount / per_step[self.unit]))
