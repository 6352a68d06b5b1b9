"""What a comparison found, measured on the trained models: the content of `results.json`."""

import dataclasses
import itertools
import math
import platform
import shlex
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.language_model import LanguageModel
from train import benchmark
from train import checkpoint as files
from train.attention_maps import attention_maps
from train.budget import Budget
from train.compare_config import CompareConfig
from train.flops import training_flops_per_token
from train.instruments import parse_instruments
from train.lengths import study_lengths, study_size
from train.loop import TrainResult
from train.machine import MACHINE
from train.metrics import read_metrics
from train.prepare import PreparedData
from train.progress import Display
from train.report.outcomes import is_softmax
from train.sampling import sample_text
from train.tuning import Trial, best_rate, recipe_rate
from train.turns import Divergence, Outcome

TRAINING_ROUNDS = 8
DECODED_TOKENS = 80
LOOKED_AT = 512
"""Validation tokens among which a sentence is looked for."""
FEWEST_SPANS = 2
"""Of the longest windows, where the text holds them: one alone gives no margin."""

Outcomes = dict[str, list[tuple[int, Outcome]]]
"""By mixer, the seeds with what came of them."""


def training_speeds(
    config: CompareConfig, shapes: dict[str, ModelConfig], rounds: int, show: Any
) -> dict[str, benchmark.Measurement]:
    """Tokens/s of fresh models of these shapes, measured in turn; `show` gets the steps done."""
    return benchmark.measure_training(
        {name: LanguageModel(shape) for name, shape in shapes.items()},
        context=config.context,
        batch_size=config.batch_size,
        rounds=rounds,
        advance=_counting(show),
    )


def measure(
    config: CompareConfig,
    shapes: dict[str, ModelConfig],
    plan: dict[str, Any],
    runs: Outcomes,
    data: PreparedData,
    display: Display,
) -> dict[str, Any]:
    """Everything that `results.json` holds; `plan` is what `comparison.json` does."""
    with display.task("Measuring training", (TRAINING_ROUNDS + 1) * len(shapes)) as show:
        speeds = training_speeds(config, shapes, TRAINING_ROUNDS, show)
    trained = {name: _first_trained(made) for name, made in runs.items()}
    models = {
        name: LanguageModel(shapes[name]) if model is None else model
        for name, model in trained.items()
    }
    with display.task("Measuring generation", len(config.lengths) * len(shapes)) as show:
        decoding = benchmark.measure_decoding(
            models, contexts=config.lengths, tokens=DECODED_TOKENS, advance=_counting(show)
        )
    return {
        "format": 1,
        "settings": {
            **config.to_dict(),
            "mixers": config.names,
            "contexts": config.lengths,
            "steps": max(plan["steps"].values()),
            "seeds": list(range(config.seeds)),
            "command": _command(config, plan["steps"]),
        },
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "precision": _precision(runs),
            "torch": torch.__version__,
            "ebb": metadata.version("ebb-lm"),
        },
        "data": {
            "name": data.name,
            "tokenizer": data.tokenizer.name,
            "vocab_size": data.tokenizer.vocab_size,
            "train_tokens": int(data.train.tokens.size),
            "validation_tokens": int(data.validation.tokens.size),
        },
        "models": [
            {
                **_training_record(config, name, shapes[name], model, plan, runs[name]),
                "training_speed": _spread("tokens_per_second", speeds[name]),
                "generation": [_generation_record(point) for point in decoding[name]],
                **_trained_record(config, name, trained[name], data, display),
                "tasks": None,
            }
            for name, model in models.items()
        ],
    }


def _precision(runs: Outcomes) -> str:
    """That of the products in training: each run has kept to the one it was begun in."""
    outcomes = [outcome for made in runs.values() for _, outcome in made]
    machines = [files.read_config(outcome.folder).get(MACHINE, {}) for outcome in outcomes]
    return ", ".join(sorted({machine.get("precision", "fp32") for machine in machines}))


def rates_of(config: CompareConfig, plan: dict[str, Any]) -> dict[str, float]:
    """The learning rate of each mixer: the best that was tried, or its recipe's."""
    tried = plan["tuning"] or {}
    return {
        name: best_rate(
            [Trial(**trial) for trial in tried.get(name, [])], recipe_rate(name, config.size)
        )
        for name in config.names
    }


def _training_record(
    config: CompareConfig,
    name: str,
    shape: ModelConfig,
    model: LanguageModel,
    plan: dict[str, Any],
    made: list[tuple[int, Outcome]],
) -> dict[str, Any]:
    """How large a model is, and what came of its training; nothing is measured for it."""
    return {
        "mixer": name,
        "parameters": model.num_parameters(),
        "ffn_dim": shape.ffn_dim,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "steps": plan["steps"][name],
        "learning_rate": rates_of(config, plan)[name],
        "tuning": plan["tuning"] and plan["tuning"][name],
        "flops_per_token": training_flops_per_token(shape, config.context),
        "runs": [_run_record(seed, outcome, config.folder) for seed, outcome in made],
    }


def _generation_record(point: benchmark.Decoding) -> dict[str, Any]:
    return {
        "context": point.context,
        **_spread("ms_per_token", point.milliseconds),
        "state_bytes": point.state_bytes,
        "peak_memory_bytes": point.peak_memory_bytes,
    }


def _trained_record(
    config: CompareConfig,
    name: str,
    model: LanguageModel | None,
    data: PreparedData,
    display: Display,
) -> dict[str, Any]:
    """What a trained model does with a text; nothing where every run diverged."""
    if model is None:
        return {"lengths": None, "sample": {"prompt": config.prompt, "text": ""}, "attention": None}
    return {
        "lengths": _lengths(config, name, model, data, display),
        "sample": {"prompt": config.prompt, "text": _sample(config, model, data)},
        "attention": _attention(config, model, data),
    }


def _first_trained(made: list[tuple[int, Outcome]]) -> LanguageModel | None:
    """The model of the first seed that did not diverge; None if all did."""
    for _, outcome in made:
        if isinstance(outcome, TrainResult):
            return files.load_checkpoint(outcome.folder).model
    return None


def _sample(config: CompareConfig, model: LanguageModel, data: PreparedData) -> str:
    text = sample_text(model, data.tokenizer, tokens=120, seed=0, prompt=config.prompt)
    return text.removeprefix(config.prompt)


def _attention(
    config: CompareConfig, model: LanguageModel, data: PreparedData
) -> list[dict[str, Any]] | None:
    """Heat maps, where the instruments look at attention; softmax must be among them."""
    if config.instruments is None or "attention" not in parse_instruments(config.instruments):
        return None
    text = data.tokenizer.decode(data.validation.tokens[:LOOKED_AT].tolist())
    with_softmax = not any(map(is_softmax, config.names))
    return attention_maps(model, data.tokenizer, text, with_softmax=with_softmax)


def _lengths(
    config: CompareConfig,
    name: str,
    model: LanguageModel,
    data: PreparedData,
    display: Display,
) -> dict[str, Any] | None:
    """The `LengthStudy` of one model on the start of the validation text, as plain values."""
    if config.extrapolate == 0:
        return None
    wanted = max(config.eval_tokens, FEWEST_SPANS * config.extrapolate * config.context) + 1
    tokens = data.validation.tokens[:wanted]
    size = study_size(tokens.size, config.context, config.extrapolate)
    with display.task(f"Longer contexts, {name}", size) as show:
        study = study_lengths(
            model,
            tokens,
            context=config.context,
            end_id=data.tokenizer.end_id,
            longest=config.extrapolate,
            progress=show,
        )
    found: dict[str, Any] = _without_nan(dataclasses.asdict(study))
    return found


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that is not finite."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run_record(seed: int, outcome: Outcome, folder: Path) -> dict[str, Any]:
    lines = read_metrics(outcome.folder / files.METRICS)
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    common = ("tokens", "seconds")
    record = {
        "seed": seed,
        "folder": outcome.folder.relative_to(folder).as_posix(),
        "validation_loss": None,
        "validation_bits_per_byte": None,
        "tokens": lines[-1]["tokens"] if lines else 0,
        "seconds": lines[-1]["seconds"] if lines else 0.0,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "diverged": None,
        "curve": [
            {**{key: line[key] for key in common}, "loss": line["loss"]}
            for line in lines
            if "loss" in line
        ],
        "validation_curve": [
            {
                **{key: line[key] for key in common},
                "loss": line["validation_loss"],
                "bits_per_byte": line["validation_bits_per_byte"],
            }
            for line in lines
            if "validation_loss" in line
        ],
        "instruments": _readings(lines),
    }
    if isinstance(outcome, Divergence):
        return record | {"diverged": {"step": outcome.step, "reason": outcome.reason}}
    return record | {
        "validation_loss": outcome.validation.loss,
        "validation_bits_per_byte": outcome.validation.bits_per_byte,
    }


def _readings(lines: Sequence[dict[str, Any]]) -> list[dict[str, float]] | None:
    """What the instruments said at each validation; of heads and of parts the last word alone."""
    found = [
        {"tokens": line["tokens"]} | {name: line[name] for name in line if "." in name}
        for line in lines
        if any("." in name for name in line)
    ]
    few = [{name: v for name, v in one.items() if name.count(".") < 2} for one in found[:-1]]
    return [*few, *found[-1:]] or None


def _counting(show: Callable[[int], None]) -> Callable[[], None]:
    """Tells `show` how often it was called."""
    done = itertools.count(1)
    return lambda: show(next(done))


def _spread(name: str, measurement: benchmark.Measurement) -> dict[str, float]:
    return {name: measurement.median, "low": measurement.low, "high": measurement.high}


def _command(config: CompareConfig, steps: dict[str, int]) -> str:
    """What repeats the comparison: a time stands as the steps that it came to."""
    settings = config.to_dict()
    if Budget.parse(config.budget).unit == "seconds":
        (every,) = set(steps.values())
        settings["budget"] = f"{every}-steps"
    parts = ["ebb", "compare"]
    for field in dataclasses.fields(CompareConfig):
        if field.name in settings and settings[field.name] != field.default:
            parts += [f"--{field.name.replace('_', '-')}", str(settings[field.name])]
    return shlex.join(parts)
