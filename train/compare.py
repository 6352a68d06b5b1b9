"""Several mixers, trained alike and measured alike: `ebb compare`."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from model.config import ModelConfig
from model.presets import preset
from train import checkpoint as files
from train.budget import Budget
from train.config import COMPARISON, CompareConfig, TrainConfig
from train.interrupt import Interrupted
from train.loop import TrainResult, train
from train.matching import matched, num_parameters
from train.prepare import prepare_data
from train.progress import Display
from train.report import REPORT, summary_lines, summary_table, write_report
from train.results import measure, training_speeds

RESULTS = "results.json"


def compare(config: CompareConfig) -> None:
    """Runs `ebb compare` and prints what came out.

    Raises:
        ValueError: for settings, data or a folder that cannot be used.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    with Display() as display:
        results = run_comparison(config, display)
    print_results(results, config.folder)


def print_results(results: dict[str, Any], folder: Path) -> None:
    """The summary, the table and the paths, to stdout."""
    console = Console(file=sys.stdout, highlight=False)
    console.print(summary_table(results))
    for line in summary_lines(results):
        console.print(line, markup=False)
    paths = [f"Report: {folder / 'report.html'}", f"Text:   {folder / 'report.md'}"]
    paths.append(f"Numbers: {folder / RESULTS}")
    paths += [f"Plot:   {plot}" for plot in sorted(folder.glob("*.png"))]
    sys.stdout.write("\n" + "".join(f"{path}\n" for path in paths))  # rich would break a long one


def run_comparison(config: CompareConfig, display: Display) -> dict[str, Any]:
    """Trains, measures and writes the report.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: for settings, data or a folder that cannot be used.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with files.locked(config.folder):
        plan = _claim_folder(config)
        if (config.folder / RESULTS).exists():
            display.say(f"The comparison in {config.folder} is complete: nothing left to do.")
            saved: dict[str, Any] = json.loads((config.folder / RESULTS).read_text("utf-8"))
            if not (config.folder / REPORT).exists():  # stopped while it was written
                write_report(saved, config.folder)
            return saved
        data = prepare_data(
            config.data, config.column, config.tokenizer, config.vocab_size, display
        )
        shapes = matched_shapes(config, data.tokenizer.vocab_size)
        if plan is None:
            plan = {"settings": config.to_dict(), "steps": _steps(config, shapes, display)}
            files.save_json(config.folder / COMPARISON, plan)
        try:
            runs = _train_all(config, shapes, int(plan["steps"]), display)
            results = measure(config, shapes, int(plan["steps"]), runs, data, display)
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted(
                f"Saved; go on with: ebb compare --resume --out {shlex.quote(str(config.folder))}"
            ) from stop
        write_report(results, config.folder)
        return results


def matched_shapes(config: CompareConfig, vocab_size: int) -> dict[str, ModelConfig]:
    """A shape for each mixer, with the parameters of the first.

    Raises:
        ValueError: if one cannot be made that small.
    """
    shapes = {name: preset(config.size, name, vocab_size) for name in config.names}
    target = num_parameters(shapes[config.names[0]])
    return {name: matched(shape, target) for name, shape in shapes.items()}


def _claim_folder(config: CompareConfig) -> dict[str, Any] | None:
    """The plan of the comparison that is to go on, or None for a fresh start."""
    plan = config.plan()
    if plan is None:
        return None
    if not config.resume:
        raise ValueError(
            f"{config.folder} already holds a comparison: add --resume to go on with it, or choose "
            "another --out."
        )
    for name, value in config.to_dict().items():
        before = plan["settings"].get(name)
        if before != value:
            raise ValueError(
                f"The comparison in {config.folder} was made with {name.replace('_', '-')} "
                f"{before}, not {value}: leave it as it was, or choose another --out."
            )
    return plan


def _steps(config: CompareConfig, shapes: dict[str, ModelConfig], display: Display) -> int:
    """Steps for each model that the budget pays for."""
    budget = Budget.parse(config.budget)
    if budget.unit != "seconds":
        return budget.steps(config.batch_size * config.context)
    with display.task("Measuring the speeds", 3 * len(shapes)) as show:
        speeds = training_speeds(config, shapes, 2, show)
    tokens = config.batch_size * config.context
    seconds = config.seeds * sum(tokens / speed.median for speed in speeds.values())
    return max(1, int(budget.amount / seconds))


def _train_all(
    config: CompareConfig, shapes: dict[str, ModelConfig], steps: int, display: Display
) -> dict[str, list[tuple[int, TrainResult]]]:
    """Trains every mixer with every seed; what is finished already is only validated."""
    runs: dict[str, list[tuple[int, TrainResult]]] = {name: [] for name in shapes}
    for seed in range(config.seeds):
        for name, shape in shapes.items():
            run = TrainConfig(
                mixer=name,
                size=config.size,
                data=config.data,
                column=config.column,
                tokenizer=config.tokenizer,
                vocab_size=config.vocab_size,
                steps=steps,
                batch_size=config.batch_size,
                context=config.context,
                ffn_dim=shape.ffn_dim,
                seed=seed,
                threads=config.threads,
                eval_tokens=config.eval_tokens,
                out=config.folder / "runs" / f"{name.replace(':', '-')}-{seed}",
                resume=True,
            )
            runs[name].append((seed, train(run, display)))
    return runs
