"""`ebb train --find-lr`: a learning-rate range test (Smith, arXiv 1506.01186)."""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data.loader import Batch
from model.language_model import LanguageModel
from train import checkpoint as files
from train.config import TrainConfig
from train.figure import PALETTE, panel, save, set_title
from train.loss import next_token_loss
from train.machine import choose_machine
from train.memory import keep_freed_memory
from train.optimizer import make_optimizer, set_rate
from train.precision import bf16_products, both_passes, training_device
from train.progress import Display
from train.recipes import recipe_of
from train.run_data import run_data, training_batches
from train.starting import dropout, new_model, seed_dropout

LOWEST, HIGHEST = 1e-5, 1.0
STEPS = 150
"""From the lowest to the highest rate, in equal factors."""
MEMORY = 0.9
"""Of the running mean of the loss."""
RUINED = 1.2
"""Times the lowest loss: where the test ends."""
MARGIN = 3.0
"""How far below the rate of the lowest loss a rate still holds for thousands of steps."""
PLOT, NUMBERS = "learning-rate.png", "learning-rate.json"


@dataclass(frozen=True)
class RangeTest:
    """What the loss did while the rate rose."""

    rates: list[float]
    losses: list[float]
    """Of the batch at each rate, before its step."""

    @property
    def smoothed(self) -> list[float]:
        """The running mean of the losses, without the bias of its start."""
        means, mean = [], 0.0
        for count, loss in enumerate(self.losses, 1):
            mean = MEMORY * mean + (1 - MEMORY) * loss
            means.append(mean / (1 - MEMORY**count))
        return means

    @property
    def best(self) -> float:
        """The rate where the mean is lowest."""
        means = self.smoothed
        return self.rates[means.index(min(means))]

    @property
    def suggestion(self) -> float:
        """A peak rate, in two digits.

        The loss turns where the rate begins to do harm within a few steps; the mean lags behind the
        loss, and a whole run is less forgiving: hence the margin.
        """
        return float(f"{self.best / MARGIN:.1e}")


def find_rate(config: TrainConfig, precision: str, display: Display) -> RangeTest:
    """Trains a model of the settings for a few steps, with a rising rate, and throws it away.

    `precision` is what `auto` has become.

    Raises:
        ValueError: for settings or data that cannot be used.
    """
    data = run_data(config, display)
    batches = training_batches(config, data)
    device = training_device()
    torch.manual_seed(config.seed)
    model = new_model(config, data.tokenizer, is_resumed=False).to(device)
    share = dropout(config, data.train.tokens.size)
    model.set_dropout(share)
    if precision == "fp64":
        model.double()
    recipe = recipe_of(model.config.mixer)
    decay = recipe.weight_decay if config.weight_decay is None else config.weight_decay
    optimizer = make_optimizer(model, recipe, LOWEST, decay, config.optimizer)
    rates: list[float] = []
    losses: list[float] = []
    test = RangeTest(rates, losses)
    with display.noted_task("Raising the rate", STEPS) as show:
        for step in range(STEPS):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
            seed_dropout(share, config.seed, step)
            value, norm = _gradients(model, batches[step], config.clip, bf16=precision == "bf16")
            if not (math.isfinite(value) and math.isfinite(norm)):
                break
            rates.append(rate)
            losses.append(value)
            show(step + 1, f"rate {rate:.1e} loss {value:.3f}")
            if value > RUINED * min(test.smoothed):
                break
            set_rate(optimizer, rate)
            with bf16_products(device, enabled=precision == "bf16"):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert losses, "a new model has a finite loss"
    return test


def _gradients(
    model: LanguageModel, batch: Batch, clip: float, *, bf16: bool
) -> tuple[float, float]:
    """Those of a batch, clipped; returns its loss and their norm."""
    device = model.head.weight.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    reset = None if batch.reset is None else batch.reset.to(device)
    loss_of = partial(next_token_loss, model, inputs, targets, reset)
    loss = both_passes(loss_of, device, bf16=bf16)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    return float(loss.detach()), float(norm)


def save_plot(test: RangeTest, title: str, path: Path) -> None:
    """The loss against the rate, its running mean, and the suggestion."""
    figure, axes = panel()
    axes.plot(test.rates, test.losses, color=PALETTE[0], linewidth=0.7, alpha=0.4)
    axes.plot(test.rates, test.smoothed, color=PALETTE[0], linewidth=2.0)
    axes.axvline(test.suggestion, color=PALETTE[1], linewidth=1.5, linestyle="--")
    low, high = min(test.losses), max(test.smoothed)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.1 * (high - low) + 1e-6)
    axes.annotate(
        f" {test.suggestion:g}",
        (test.suggestion, high),
        color=PALETTE[1],
        fontsize=10,
        fontweight="bold",
        va="center",
    )
    axes.set_xscale("log")
    axes.set_xlabel("Learning rate")
    axes.set_ylabel("Training loss (nats per token)")
    set_title(axes, title)
    note = (
        "Thin: loss of each step. Thick: its running mean. "
        f"Dashed: suggestion, {MARGIN:g} times below the mean's lowest."
    )
    save(figure, note, path)


def find_rate_command(config: TrainConfig) -> None:
    """Runs `ebb train --find-lr`; the plot and its numbers stand where the run would.

    Raises:
        ValueError: for settings, data or a folder that cannot be used.
    """
    keep_freed_memory()
    with Display() as display, files.locked(config.folder):
        machine = choose_machine(config, training_device(), display.say)
        with machine.in_use():
            test = find_rate(config, machine.precision, display)
        title = f"{config.mixer} {config.size}, {config.optimizer}: {test.suggestion:g}"
        save_plot(test, title, config.folder / PLOT)
        numbers = {
            "rates": test.rates,
            "losses": test.losses,
            "best": test.best,
            "suggestion": test.suggestion,
        }
        files.save_json(config.folder / NUMBERS, numbers)
    sys.stdout.write(
        f"The loss is lowest at a rate of {test.best:.1e}. Try --learning-rate "
        f"{test.suggestion:g}\nPlot: {config.folder / PLOT}\n"
    )
