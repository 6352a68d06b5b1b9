"""Several mixers, trained alike and measured alike: `ebb compare`."""

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from model.config import ModelConfig
from model.presets import preset
from train import checkpoint as files
from train.budget import Budget
from train.compare_config import COMPARISON, CompareConfig
from train.config import TrainConfig
from train.flops import training_flops_per_token
from train.interrupt import Interrupted
from train.matching import matched, num_parameters
from train.prepare import prepare_data
from train.progress import Display
from train.report import REPORT, summary_lines, summary_table, write_report
from train.results import measure, rates_of, training_speeds
from train.tasks import STEPS, TASKS, parse_tasks, run_tasks
from train.tuning import PART, Trial, tune
from train.turns import Outcome, train_in_turns, turns_of

RESULTS = "results.json"
Runs = dict[str, TrainConfig]
"""The settings of a run of each mixer, by the mixer's name."""


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
            plan = _make_plan(config, shapes, display)
            files.save_json(config.folder / COMPARISON, plan)
        try:
            runs = _tune(config, plan, _runs(config, shapes, plan), display)
            outcomes = _train_all(config, plan, runs, display)
            answers = _tasks(config, display)
            results = measure(config, shapes, plan, outcomes, data, display)
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted(
                f"Saved; go on with: ebb compare --resume --out {shlex.quote(str(config.folder))}"
            ) from stop
        for model in results["models"]:
            model |= answers.get(model["mixer"], {})
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
    settings, now = plan["settings"], config.to_dict()
    if missing := [name.replace("_", "-") for name in now if name not in settings]:
        raise _of_another_version(config, f"which had no {missing[0]}")
    for name, value in now.items():
        if settings[name] != value:
            raise ValueError(
                f"The comparison in {config.folder} was made with {name.replace('_', '-')} "
                f"{settings[name]}, not {value}: leave it as it was, or choose another --out."
            )
    if not _is_whole(plan, config.names):
        raise _of_another_version(config, "with another plan")
    return plan


def _of_another_version(config: CompareConfig, how: str) -> ValueError:
    return ValueError(
        f"{config.folder} was made by another version of Ebb ({how}): go on with that version, or "
        "choose another --out."
    )


def _is_whole(plan: dict[str, Any], names: list[str]) -> bool:
    """Whether a plan has what `_make_plan` and `_tune` write."""
    try:
        counts = [plan["turns"], *(plan["steps"][name] for name in names)]
        if plan["tuning"] is not None:
            for name in names:
                _ = [Trial(**trial) for trial in plan["tuning"][name]]
    except (KeyError, TypeError):
        return False
    return all(isinstance(count, int) for count in counts)


def _make_plan(
    config: CompareConfig, shapes: dict[str, ModelConfig], display: Display
) -> dict[str, Any]:
    """What `comparison.json` holds: a time has become steps, which stay what they are."""
    budget = Budget.parse(config.budget)
    tokens = config.batch_size * config.context
    turns = 1
    if budget.unit == "seconds":
        with display.task("Measuring the speeds", 3 * len(shapes)) as show:
            speeds = training_speeds(config, shapes, 2, show)
        a_step = sum(tokens / speed.median for speed in speeds.values())
        steps = max(1, int(budget.amount / a_step / (config.seeds + config.tune / PART)))
        of_each = dict.fromkeys(shapes, steps)
        turns = turns_of(steps * a_step / len(shapes))
    else:
        of_each = {
            name: budget.steps(tokens, training_flops_per_token(shape, config.context))
            for name, shape in shapes.items()
        }
    return {"settings": config.to_dict(), "steps": of_each, "turns": turns, "tuning": None}


def _tune(config: CompareConfig, plan: dict[str, Any], runs: Runs, display: Display) -> Runs:
    """The runs at the best of the rates tried, which are written into the plan once."""
    if config.tune and plan["tuning"] is None:
        folder = config.folder / "tune"
        like = {
            name: dataclasses.replace(run, seed=config.seeds, out=folder, instruments=None)
            for name, run in runs.items()
        }
        trials = tune(like, config.tune, plan["turns"], display)
        plan["tuning"] = {
            name: [dataclasses.asdict(trial) for trial in tried] for name, tried in trials.items()
        }
        files.save_json(config.folder / COMPARISON, plan)
        for name, rate in rates_of(config, plan).items():
            failed = all(trial.validation_loss is None for trial in trials[name])
            which = "diverged at all of {}; its recipe's" if failed else "best of {}"
            display.say(f"{name}: {which.format(f'{config.tune} learning rates')}: {rate:g}")
    shutil.rmtree(config.folder / "tune", ignore_errors=True)  # what counts is in the plan
    rates = rates_of(config, plan)
    return {name: dataclasses.replace(run, learning_rate=rates[name]) for name, run in runs.items()}


def _tasks(config: CompareConfig, display: Display) -> dict[str, dict[str, Any]]:
    """What `run_tasks` found, by mixer; nothing where no task was asked for."""
    if config.tasks is None:
        return {}
    return run_tasks(
        {name: TASKS[name] for name in parse_tasks(config.tasks)},
        config.names,
        seeds=config.seeds,
        steps=config.task_steps or STEPS,
        folder=config.folder,
        display=display,
    )


def _runs(config: CompareConfig, shapes: dict[str, ModelConfig], plan: dict[str, Any]) -> Runs:
    """A run of each mixer; seed and folder are still to come."""
    return {
        name: TrainConfig(
            mixer=name,
            size=config.size,
            data=config.data,
            column=config.column,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            steps=plan["steps"][name],
            batch_size=config.batch_size,
            context=config.context,
            ffn_dim=shape.ffn_dim,
            threads=config.threads,
            eval_tokens=config.eval_tokens,
            instruments=config.instruments,
            sample_every=0,
            resume=True,
        )
        for name, shape in shapes.items()
    }


def _train_all(
    config: CompareConfig, plan: dict[str, Any], runs: Runs, display: Display
) -> dict[str, list[tuple[int, Outcome]]]:
    """Trains every mixer with every seed; what is finished already is only validated."""
    found: dict[str, list[tuple[int, Outcome]]] = {name: [] for name in runs}
    for seed in range(config.seeds):
        seeded = {
            f"{name}, seed {seed}": dataclasses.replace(
                run, seed=seed, out=config.folder / "runs" / f"{name.replace(':', '-')}-{seed}"
            )
            for name, run in runs.items()
        }
        outcomes = train_in_turns(seeded, plan["turns"], display)
        for made, outcome in zip(found.values(), outcomes.values(), strict=True):
            made.append((seed, outcome))
    return found
