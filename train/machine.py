"""What a run computes with beside its settings; one that goes on computes with the same.

Threads, kernels, compilation and precision change how numbers are rounded, and so the last digits
of a loss: they are recorded in `config.json`, of which every snapshot has a copy.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from model.ops import native
from train import snapshot
from train.config import TrainConfig
from train.precision import choose_precision, is_fast_in_bf16

MACHINE = "machine"
"""In `config.json`: what the run computes with."""
ASKED = ("threads", "backend", "compile", "precision")
"""Settings of a run, of the same names, which leave the choice to the machine or make it."""
DIFFER = "from here on the numbers differ from those of a run never stopped."


@dataclass(frozen=True)
class Machine:
    """What a run computes with."""

    threads: int
    backend: str
    """`native` or `torch`, as in `OPS`."""
    compile: bool
    """Whether blocks are compiled."""
    precision: str
    """`fp32`, `bf16` or `fp64`, of the products in a step."""
    processor: str = dataclasses.field(
        default_factory=lambda: torch.backends.cpu.get_cpu_capability()
    )
    torch: str = torch.__version__

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Computes with it; the threads stay when the block is left, as `torch` has them."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with native.switched(on=self.backend == "native"):
            yield

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def choose_machine(
    config: TrainConfig, device: torch.device, say: Callable[[str], None]
) -> Machine:
    """What is asked for; what is not, as the run in the folder has it, or as PyTorch chooses.

    Args:
        config: of the run, whose folder is its own or free.
        device: that it is trained on.
        say: hears of what cannot be as it was, or is to change.

    Raises:
        ValueError: for kernels that are not there, or weights of another precision.
    """
    before, settings = _recorded(config, device)
    asked: dict[str, Any] = {name: getattr(config, name) for name in ASKED}
    for name, value in asked.items():
        if name in before and (value in (None, "auto") or value == settings.get(name)):
            asked[name] = before[name]
        elif name in before and value != before[name]:
            say(f"Going on with {name} {value} instead of {before[name]}: {DIFFER}")
    if asked["backend"] == "native" and not native.is_available():
        raise ValueError(
            f"{native.status()}; to train without the native kernels, add --backend torch"
        )
    if asked["backend"] == "auto":
        asked["backend"] = "native" if native.is_available() else "torch"
    with native.switched(on=asked["backend"] == "native"):
        precision = choose_precision(asked["precision"], device)
        if config.precision == "auto" and precision == "bf16" and not is_fast_in_bf16(device):
            precision = "fp32"
            say(f"Going on with precision fp32 instead of bf16, which is slow here: {DIFFER}")
    then = before.get("precision", precision)
    if then != precision and "fp64" in (then, precision):
        raise ValueError(
            f"The run in {config.folder} was made with precision {then}, not {precision}: leave "
            "it as it was, or choose another --out."
        )
    asked["precision"] = precision
    machine = Machine(**{**asked, "threads": asked["threads"] or torch.get_num_threads()})
    for name in ("processor", "torch"):
        now, then = getattr(machine, name), before.get(name)
        if then is not None and then != now:
            say(f"This run was begun with {name} {then}, here it is {now}: {DIFFER}")
    return machine


def _recorded(config: TrainConfig, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the run in the folder computes with, and its settings; empty if there is none."""
    try:
        saved = snapshot.read_run(config.folder)
    except ValueError:
        return {}, {}
    settings = saved["train"]
    precision = settings.get("precision", "auto")
    if precision == "auto":  # of a run that does not say: no CPU had another then
        precision = choose_precision("auto", device) if device.type == "cuda" else "fp32"
    return {"precision": precision, **saved.get(MACHINE, {})}, settings
