"""What a comparison found, measured on the trained models: the content of `results.json`."""

import dataclasses
import platform
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.language_model import LanguageModel
from train import benchmark
from train import checkpoint as files
from train.config import CompareConfig
from train.loop import TrainResult
from train.metrics import read_metrics
from train.prepare import PreparedData
from train.progress import Display
from train.sampling import sample_text

TRAINING_ROUNDS = 8
DECODED_TOKENS = 80


def training_speeds(
    config: CompareConfig, shapes: dict[str, ModelConfig], rounds: int, show: Any
) -> dict[str, benchmark.Measurement]:
    """Tokens/s of fresh models of these shapes, measured in turn; `show` gets the steps done."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        show(done)

    return benchmark.measure_training(
        {name: LanguageModel(shape) for name, shape in shapes.items()},
        context=config.context,
        batch_size=config.batch_size,
        rounds=rounds,
        advance=advance,
    )


def measure(
    config: CompareConfig,
    shapes: dict[str, ModelConfig],
    steps: int,
    runs: dict[str, list[tuple[int, TrainResult]]],
    data: PreparedData,
    display: Display,
) -> dict[str, Any]:
    """Everything that `results.json` holds."""
    with display.task("Measuring training", (TRAINING_ROUNDS + 1) * len(shapes)) as show:
        speeds = training_speeds(config, shapes, TRAINING_ROUNDS, show)
    trained = {name: files.load_checkpoint(made[0][1].folder).model for name, made in runs.items()}
    done = 0
    with display.task("Measuring generation", len(config.lengths) * len(shapes)) as show:

        def advance() -> None:
            nonlocal done
            done += 1
            show(done)

        decoding = benchmark.measure_decoding(
            trained, contexts=config.lengths, tokens=DECODED_TOKENS, advance=advance
        )
    models = []
    for name, model in trained.items():
        text = sample_text(model, data.tokenizer, tokens=120, seed=0, prompt=config.prompt)
        models.append(
            {
                "mixer": name,
                "parameters": model.num_parameters(),
                "ffn_dim": shapes[name].ffn_dim,
                "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
                "runs": [_run_record(seed, result, config.folder) for seed, result in runs[name]],
                "training_speed": _spread("tokens_per_second", speeds[name]),
                "generation": [
                    {
                        "context": point.context,
                        **_spread("ms_per_token", point.milliseconds),
                        "state_bytes": point.state_bytes,
                    }
                    for point in decoding[name]
                ],
                "sample": {"prompt": config.prompt, "text": text.removeprefix(config.prompt)},
            }
        )
    return {
        "format": 1,
        "settings": {
            **config.to_dict(),
            "mixers": config.names,
            "contexts": config.lengths,
            "steps": steps,
            "seeds": list(range(config.seeds)),
            "command": _command(config, steps),
        },
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
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
        "models": models,
    }


def _run_record(seed: int, result: TrainResult, folder: Path) -> dict[str, Any]:
    lines = read_metrics(result.folder / files.METRICS)
    common = ("tokens", "seconds")
    return {
        "seed": seed,
        "folder": result.folder.relative_to(folder).as_posix(),
        "validation_loss": result.validation.loss,
        "validation_bits_per_byte": result.validation.bits_per_byte,
        "tokens": result.tokens,
        "seconds": lines[-1]["seconds"],
        "tokens_per_second": result.tokens_per_second,
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
    }


def _spread(name: str, measurement: benchmark.Measurement) -> dict[str, float]:
    return {name: measurement.median, "low": measurement.low, "high": measurement.high}


def _command(config: CompareConfig, steps: int) -> str:
    """What repeats the comparison: with the steps that were taken, whatever the budget was."""
    parts = ["ebb", "compare"]
    settings = {**config.to_dict(), "budget": f"{steps}-steps"}
    for field in dataclasses.fields(CompareConfig):
        if field.name in settings and settings[field.name] != field.default:
            parts += [f"--{field.name.replace('_', '-')}", str(settings[field.name])]
    return shlex.join(parts)
