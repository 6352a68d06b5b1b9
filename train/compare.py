"""Several mixers, trained alike and measured alike: `ebb compare`."""

import dataclasses
import json
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from model.config import SIZES, ModelConfig, parse_mixer
from model.language_model import LanguageModel
from train import benchmark
from train import checkpoint as files
from train.budget import Budget
from train.config import CHECKPOINTS, TrainConfig
from train.interrupt import Interrupted
from train.loop import TrainResult, train
from train.matching import matched, num_parameters
from train.metrics import read_metrics
from train.prepare import PreparedData, prepare_data
from train.progress import Display
from train.report import summary_lines, summary_table, write_report
from train.sampling import sample_text

SETTINGS = "comparison.json"
RESULTS = "results.json"
TRAINING_ROUNDS = 5
DECODED_TOKENS = 30


@dataclass(frozen=True)
class CompareConfig:
    """Train several mixers alike and report on them.

    All models get the same number of parameters, by the width of their channel mix, and see the
    same tokens in the same order; each has its own recipe. The report, its plots and `results.json`
    stand in the folder given by `--out`. Ctrl-C saves; `--resume` goes on.
    """

    mixers: str = "rwkv7,attention"
    """Names with commas between, as in `ebb train`; the first one's parameters are matched."""
    size: str = "micro"
    """nano, micro, tiny or small, as in `ebb train`."""
    data: str = "sotu"
    """A text, as in `ebb train`."""
    column: str = "text"
    """Column or key that holds the text, where the data has columns."""
    tokenizer: str = "bpe"
    """bpe (trained on the data), bytes, or the path of a tokenizer.json."""
    vocab_size: int | None = None
    """Vocabulary of a bpe to train; 4096 if not given."""
    budget: str = "1000-steps"
    """Training of each model: 500-steps or 2M-tokens; or 10min for all of the training together,
    turned into equal steps by measuring the speeds first."""
    batch_size: int = 8
    """Sequences a step."""
    context: int = 256
    """Tokens a sequence."""
    seeds: int = 1
    """How many times each model is trained, with other weights and another order of the data."""
    contexts: str = "128,1k,4k,16k"
    """Tokens already seen when generation is measured."""
    eval_tokens: int = 65_536
    """Validation tokens, spread evenly over the text."""
    prompt: str = "The "
    """What the samples go on from."""
    threads: int | None = None
    """CPU threads; what PyTorch chooses if not given."""
    out: Path | None = None
    """Folder of the comparison; checkpoints/compare-SIZE-DATA if not given."""
    resume: bool = False
    """Go on with the comparison in the folder; start afresh if there is none."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run.

        Raises:
            ValueError: naming the setting.
        """
        if len(set(self.names)) != len(self.names) or len(self.names) < 1:
            raise ValueError(f"mixers must be different names, but are {self.mixers!r}")
        for name in self.names:
            parse_mixer(name)
        if self.size not in SIZES:
            raise ValueError(f"there is no size {self.size!r}; choose one of {', '.join(SIZES)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, but is {self.seeds}")
        Budget.parse(self.budget)
        _ = self.lengths

    @property
    def names(self) -> list[str]:
        """The mixers."""
        return [name.strip() for name in self.mixers.split(",")]

    @property
    def lengths(self) -> list[int]:
        """The contexts, rising."""
        return sorted({parse_count(text) for text in self.contexts.split(",")})

    @property
    def folder(self) -> Path:
        """Where the comparison is written."""
        if self.out is not None:
            return self.out
        data = "".join(c if c.isalnum() else "-" for c in Path(self.data).stem)
        return CHECKPOINTS / f"compare-{self.size}-{data}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values of what makes it this comparison."""
        values = dataclasses.asdict(self)
        del values["out"], values["resume"]
        return values


def parse_count(text: str) -> int:
    """`"128"`, `"4k"` (4,096) or `"2M"` (2,097,152) -> a number of tokens of context.

    Raises:
        ValueError: for anything else.
    """
    text = text.strip()
    factor = {"k": 2**10, "m": 2**20}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdigit() or int(digits) < 1:
        raise ValueError(f"contexts must be numbers such as 128 or 4k, but one is {text!r}")
    return int(digits) * factor


def compare(config: CompareConfig) -> None:
    """Runs `ebb compare` and prints what came out.

    Raises:
        ValueError: for settings, data or a folder that cannot be used.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    with Display() as display:
        results = run_comparison(config, display)
    print_results(results, config.folder, display)


def print_results(results: dict[str, Any], folder: Path, display: Display) -> None:
    """The summary, the table and the paths, to stdout."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    console.print(summary_table(results))
    for line in summary_lines(results):
        console.print(line, markup=False)
    console.print(f"\nReport: {folder / 'report.md'}\nNumbers: {folder / RESULTS}", markup=False)
    for plot in sorted(folder.glob("*.png")):
        console.print(f"Plot:   {plot}", markup=False)


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
            return saved
        data = prepare_data(
            config.data, config.column, config.tokenizer, config.vocab_size, display
        )
        shapes = matched_shapes(config, data.tokenizer.vocab_size)
        if plan is None:
            plan = {"settings": config.to_dict(), "steps": _steps(config, shapes, display)}
            files.save_json(config.folder / SETTINGS, plan)
        try:
            runs = _train_all(config, shapes, int(plan["steps"]), display)
        except Interrupted as stop:
            raise Interrupted(
                f"Saved; go on with: ebb compare --resume --out {config.folder}"
            ) from stop
        results = _measure(config, shapes, int(plan["steps"]), runs, data, display)
        write_report(results, config.folder)
        return results


def matched_shapes(config: CompareConfig, vocab_size: int) -> dict[str, ModelConfig]:
    """A shape for each mixer, with the parameters of the first.

    Raises:
        ValueError: if one cannot be made that small.
    """
    shapes = {name: ModelConfig.preset(config.size, name, vocab_size) for name in config.names}
    target = num_parameters(shapes[config.names[0]])
    return {name: matched(shape, target) for name, shape in shapes.items()}


def _claim_folder(config: CompareConfig) -> dict[str, Any] | None:
    """The plan of the comparison that is to go on, or None for a fresh start."""
    path = config.folder / SETTINGS
    if not path.exists():
        return None
    if not config.resume:
        raise ValueError(
            f"{config.folder} already holds a comparison: add --resume to go on with it, or choose "
            "another --out."
        )
    plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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
        speeds = _training_speeds(config, shapes, 2, show)
    tokens = config.batch_size * config.context
    seconds = config.seeds * sum(tokens / speed.median for speed in speeds.values())
    return max(1, int(budget.amount / seconds))


def _training_speeds(
    config: CompareConfig, shapes: dict[str, ModelConfig], rounds: int, show: Any
) -> dict[str, benchmark.Measurement]:
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


def _measure(
    config: CompareConfig,
    shapes: dict[str, ModelConfig],
    steps: int,
    runs: dict[str, list[tuple[int, TrainResult]]],
    data: PreparedData,
    display: Display,
) -> dict[str, Any]:
    """Everything that `results.json` holds."""
    with display.task("Measuring training", (TRAINING_ROUNDS + 1) * len(shapes)) as show:
        speeds = _training_speeds(config, shapes, TRAINING_ROUNDS, show)
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
