"""How much training: `500-steps`, `20M-tokens` or `5min`."""

import re
from dataclasses import dataclass
from typing import Self

_UNITS = {"steps": "steps", "tokens": "tokens", "s": "seconds", "min": "seconds", "h": "seconds"}
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Budget:
    """An amount of steps, tokens or seconds."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `500-steps`, `20M-tokens`, `90s`, `5min` or `1h`.

        Raises:
            ValueError: for anything else.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)-?(steps|tokens|s|min|h)", text.strip())
        amount = float(match[1]) * _FACTORS[match[2]] if match else 0.0
        if match is None or amount <= 0:
            raise ValueError(f"budget must be like 500-steps, 20M-tokens or 5min, but is {text!r}")
        return cls(amount * _SECONDS.get(match[3], 1.0), _UNITS[match[3]])

    def steps(self, tokens_per_step: int) -> int:
        """Whole optimiser steps that it pays for, at least one; not for a time."""
        assert self.unit in ("steps", "tokens")
        per_step = 1 if self.unit == "steps" else tokens_per_step
        return max(1, int(self.amount / per_step))
