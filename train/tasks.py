"""What the loss on text hides: mixers learn the tasks of `data.synthetic` and are asked.

For each task, mixer and seed a small model is trained from nothing. A trial that is finished leaves
one file, which an interrupted comparison finds again; what decides a trial is only its settings,
so that a repeat gives the same bits.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from data import synthetic
from data.synthetic import SyntheticBatch
from model.config import ModelConfig
from model.language_model import LanguageModel
from train import checkpoint as files
from train.interrupt import Interrupted, stop_on_signal
from train.matching import num_parameters
from train.optimizer import make_optimizer, set_rate
from train.progress import Display
from train.recipes import recipe_of
from train.schedule import rate_factor
from train.task_shapes import matched_task_shapes, state_bytes

STEPS = 2000
WARMUP = 0.05
"""The part of the steps in which the rate rises."""
CLIP = 1.0
MEASURED_ROWS = 256
MEASURED_SEED = 2**31
"""Of what is asked at the end, the same for all; no training has it."""
FOLDER = "tasks"

Point = dict[str, int]


@dataclass(frozen=True)
class Task:
    """One task, how it is trained and where it is measured."""

    make: Callable[..., SyntheticBatch]
    """Of rows, a point, seed and step."""
    vocab_size: int
    trained: tuple[Point, ...]
    """The points of the training batches, the easiest first: see `point_of`."""
    measured: tuple[Point, ...]
    """The easiest first."""
    tracked: bool = False
    """Every token has a target; only the second half of them is measured."""
    widths: tuple[int, ...] = (64,)
    """Of the models, the easiest first; named in the points where there are several."""
    layers: int = 2
    rows: int = 32
    """Of a batch."""
    learning_rate: float = 3e-3
    """The peak, for every mixer: these models are smaller, and their batches other, than those on
    text that a recipe's rate is for."""

    def head_dim(self, width: int) -> int:
        """Two heads."""
        return width // 2


def _points(name: str, *values: int) -> tuple[Point, ...]:
    return tuple({name: value} for value in values)


def _of_states(make: Callable[..., SyntheticBatch], vocab_size: int) -> Task:
    return Task(
        make,
        vocab_size,
        trained=_points("length", 4, 8, 16, 32),
        measured=_points("length", 32, 64, 128, 256),
        tracked=True,
    )


TASKS: dict[str, Task] = {
    "recall": Task(
        partial(synthetic.recall, vocab_size=66),
        vocab_size=66,
        trained=_points("num_pairs", 2, 4, 8, 16),
        measured=_points("num_pairs", 4, 8, 16, 32),
        widths=(64, 32),
        rows=64,
        learning_rate=2e-3,
    ),
    "copying": Task(
        synthetic.copying,
        vocab_size=16,
        trained=_points("length", 8, 16, 32),
        measured=_points("length", 8, 16, 32, 64),
    ),
    "induction": Task(
        synthetic.induction,
        vocab_size=16,
        trained=_points("length", 16, 32, 64),
        measured=_points("length", 32, 64, 128, 256),
    ),
    "parity": _of_states(synthetic.parity, 2),
    "s3": _of_states(partial(synthetic.permutations, size=3), 6),
    "s5": _of_states(partial(synthetic.permutations, size=5), 120),
    "needle": Task(
        synthetic.needle,
        vocab_size=32,
        trained=_points("distance", 8, 16, 32, 64),
        measured=_points("distance", 16, 64, 128, 256, 512),
    ),
}
"""By the name that `ebb compare --tasks` takes."""


def parse_tasks(text: str) -> list[str]:
    """`"recall,parity"` or `"all"` -> names of `TASKS`.

    Raises:
        ValueError: naming the tasks that exist.
    """
    names = list(TASKS) if text.strip() == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}; choose of {', '.join(TASKS)}, or all")
    if len(set(names)) != len(names):
        raise ValueError(f"tasks must be different, but are {text!r}")
    return names


def run_tasks(
    tasks: Mapping[str, Task],
    mixers: list[str],
    *,
    seeds: int,
    steps: int,
    folder: Path,
    display: Display,
) -> dict[str, dict[str, Any]]:
    """Trains and measures every mixer at every task, all with the same steps and seeds.

    Args:
        tasks: by name.
        mixers: as the command line names them.
        seeds: trials of each, of the seeds 0, 1, ...
        steps: of each trial.
        folder: of the comparison; what is finished there is not done again.
        display: for progress.

    Returns:
        For each mixer what `results.json` holds of it: `tasks`, the accuracies by task and point;
        and `task_models`, by task a list of the models' `width`, `head_dim`, `ffn_dim`,
        `parameters`, and `state_bytes` at the end of the longest text measured.

    Raises:
        ValueError: if a mixer cannot be made.
        Interrupted: after Ctrl-C, when all finished trials are saved.
    """
    found: dict[str, dict[str, Any]] = {name: {"tasks": {}, "task_models": {}} for name in mixers}
    for task_name, task in tasks.items():
        for width in task.widths:
            shapes = matched_task_shapes(
                mixers,
                vocab_size=task.vocab_size,
                width=width,
                layers=task.layers,
                head_dim=task.head_dim(width),
            )
            accuracies: dict[str, list[list[float] | None]] = {name: [] for name in mixers}
            for seed in range(seeds):
                for name, shape in shapes.items():
                    stem = f"{task_name}-{width}-{name.replace(':', '-')}-{seed}"
                    path = folder / FOLDER / f"{stem}.json"
                    with display.named(f"{task_name}, {name}, seed {seed}"):
                        trial = _trial(task, shape, seed, steps, path, display)
                    accuracies[name].append(trial)
            for name, of_seeds in accuracies.items():
                entries = found[name]["tasks"].setdefault(task_name, [])
                entries += _entries(task, width, of_seeds)
                described = found[name]["task_models"].setdefault(task_name, [])
                described.append(_described(task, shapes[name]))
    return found


def train_task(
    task: Task,
    shape: ModelConfig,
    *,
    seed: int,
    steps: int,
    advance: Callable[[int, float], None] = lambda done, loss: None,
) -> LanguageModel | None:
    """A model of that shape that has learned from `steps` batches; None if it diverged.

    AdamW with the mixer's own betas, eps and weight decay, at the task's learning rate, along a
    cosine; gradients longer than `CLIP` are scaled down.

    Args:
        task: of which only the trained points are seen.
        shape: of the model.
        seed: of the weights and the batches.
        steps: batches.
        advance: called after every step with how many are done and the loss.
    """
    recipe = recipe_of(shape.mixer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(shape)
    optimizer = make_optimizer(model, recipe, task.learning_rate, recipe.weight_decay)
    warmup = round(WARMUP * steps)
    for step in range(steps):
        factor = rate_factor(step, steps=steps, warmup=warmup, final_fraction=recipe.final_fraction)
        set_rate(optimizer, task.learning_rate * factor)
        batch = task.make(task.rows, **point_of(task, step, steps), seed=seed, step=step)
        features, _ = model.features(batch.inputs)
        loss = F.cross_entropy(model.head(features[batch.counted]), batch.targets[batch.counted])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not math.isfinite(loss.item() + norm.item()):
            return None
        optimizer.step()
        advance(step + 1, loss.item())
    return model


def point_of(task: Task, step: int, steps: int) -> Point:
    """What a batch is made of: in the first half of the steps the easiest, then all in turn.

    Mixed from the start, the hard ones keep attention from learning `recall` in so few steps; once
    it has learned the easy one, it soon learns them too.
    """
    return task.trained[step % len(task.trained) if 2 * step >= steps else 0]


@torch.no_grad()
def measure_task(task: Task, model: LanguageModel) -> list[float]:
    """The share of right answers at each measured point."""
    found = []
    for point in task.measured:
        skip = {"skip": point["length"] // 2} if task.tracked else {}
        right = asked = 0
        for piece in range(MEASURED_ROWS // task.rows):
            batch = task.make(task.rows, **point, **skip, seed=MEASURED_SEED, step=piece)
            features, _ = model.features(batch.inputs)
            answers = model.head(features[batch.counted]).argmax(-1)
            right += int((answers == batch.targets[batch.counted]).sum())
            asked += answers.numel()
        found.append(right / asked)
    return found


def _trial(
    task: Task, shape: ModelConfig, seed: int, steps: int, path: Path, display: Display
) -> list[float] | None:
    """Accuracy at each point; None if the training diverged. Read where it is finished already."""
    settings = _settings(task) | {"steps": steps, "seed": seed, "shape": dataclasses.asdict(shape)}
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["settings"] == settings:
            accuracies: list[float] | None = saved["accuracies"]
            return accuracies
    with display.noted_task("training", steps) as show, stop_on_signal(display.say) as stop:

        def advance(done: int, loss: float) -> None:
            show(done, f"loss {loss:.3f}")
            if stop.requested:
                raise Interrupted("Stopped in a task, which begins anew.")

        model = train_task(task, shape, seed=seed, steps=steps, advance=advance)
    accuracies = None if model is None else measure_task(task, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save_json(path, {"settings": settings, "accuracies": accuracies})
    if not display.is_live:
        display.say("diverged" if accuracies is None else _shown(accuracies))
    return accuracies


def _settings(task: Task) -> dict[str, Any]:
    """What a trial depends on, of a task, as JSON has it."""
    found = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    made = found.pop("make")
    found["make"] = made.keywords if isinstance(made, partial) else {}
    settings: dict[str, Any] = json.loads(json.dumps(found))
    return settings


def _entries(task: Task, width: int, of_seeds: list[list[float] | None]) -> list[dict[str, Any]]:
    named = {"width": width} if len(task.widths) > 1 else {}
    entries = []
    for place, point in enumerate(task.measured):
        values = [None if one is None else one[place] for one in of_seeds]
        known = [value for value in values if value is not None]
        mean = fmean(known) if known else None
        entries.append({"point": {**named, **point}, "accuracy": mean, "seeds": values})
    return entries


def _described(task: Task, shape: ModelConfig) -> dict[str, int | None]:
    longest = task.make(1, **task.measured[-1], seed=0, step=0).inputs.shape[1]
    return {
        "width": shape.d_model,
        "head_dim": shape.head_dim,
        "ffn_dim": shape.ffn_dim,
        "parameters": num_parameters(shape),
        "state_bytes": state_bytes(shape, longest),
    }


def _shown(accuracies: list[float]) -> str:
    return "accuracy " + ", ".join(f"{100 * value:.1f} %" for value in accuracies)
