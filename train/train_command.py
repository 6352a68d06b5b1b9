"""`ebb train`, and what it says at the end."""

import shlex
import sys

from accelerate import PartialState

from train.config import TrainConfig
from train.loop import train


def train_command(config: TrainConfig) -> None:
    """Runs `ebb train` and prints how it ended.

    Raises:
        ValueError: for settings, data or a folder that cannot be used.
        Diverged: when the run has come to nothing.
        Interrupted: after Ctrl-C, when all is saved; after a second one, at once.
    """
    if config.find_lr:
        from train.find_rate import find_rate_command  # matplotlib is slow to import

        find_rate_command(config)
        return
    result = train(config)
    if not PartialState().is_main_process:
        return
    sys.stdout.write(
        f"{result.folder}: {result.num_parameters:,} parameters, {result.tokens:,} tokens at "
        f"{result.tokens_per_second:,.0f} tokens/s; validation {result.validation.loss:.4f} "
        f"nats/token, {result.validation.bits_per_byte:.4f} bits/byte\n"
        f"Write with it: ebb generate {shlex.quote(str(result.folder))} --prompt 'The'\n"
    )
