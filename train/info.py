"""`ebb info`: the machine and the mixers, or one checkpoint."""

import dataclasses
import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table

from model import state as states
from model.config import SIZES
from model.language_model import LanguageModel
from model.layers import MIXERS
from model.layers.attention import AttentionOptions
from model.ops import FORMS, OPS, native
from model.ops.scores import SCORES
from model.presets import preset
from train.checkpoint import TOKENIZER, load_model, read_tokenizer
from train.half_lives import TOKENS, half_lives, known_text
from train.instruments_info import instruments_info
from train.precision import choose_precision, training_device
from train.readable import readable_bytes, three_digits

CONTEXTS = (1024, 16384)


@dataclass(frozen=True)
class InfoConfig:
    """Show the machine, the versions and the mixers; or, with a checkpoint, what it holds."""

    checkpoint: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT]")
    ] = None
    """Folder of a run, such as checkpoints/rwkv7-micro-sotu."""
    json: bool = False
    """Print one JSON object instead of tables."""
    markdown: bool = False
    """Print the table of mixers in Markdown, as the README shows it."""
    instruments: bool = False
    """Read all instruments on the built-in text, and draw attention.png and instruments.png in the
    checkpoint's folder."""
    beside: Path | None = None
    """With --instruments: another checkpoint whose attention to draw beside, such as one trained
    with softmax."""

    def __post_init__(self) -> None:
        """Refuses what has no effect.

        Raises:
            ValueError: naming the setting.
        """
        if self.markdown and (self.json or self.checkpoint is not None):
            raise ValueError("markdown prints the table of mixers only: leave the rest out")
        if self.instruments and self.checkpoint is None:
            raise ValueError("instruments need a checkpoint to read: name its folder")
        if self.beside is not None and not self.instruments:
            raise ValueError("beside is of the plots of --instruments: add it, or leave it out")


def info(config: InfoConfig) -> None:
    """Runs `ebb info`.

    Raises:
        ValueError: for a checkpoint that cannot be read.
    """
    if config.markdown:
        sys.stdout.write(mixers_markdown() + "\n")
        return
    if config.checkpoint is None:
        report = machine_info()
    else:
        report = checkpoint_info(config.checkpoint)
        if config.instruments:
            report |= instruments_info(config.checkpoint, config.beside)
    if config.json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    console = Console(file=sys.stdout, highlight=False)
    for title, values in report.items():
        if isinstance(values, list):
            table = Table(*(key.replace("_", " ") for key in values[0]), title=title)
            for row in values:
                table.add_row(*(_readable(value) for value in row.values()))
        else:
            table = Table(title=title, show_header=False)
            for key, value in values.items():
                table.add_row(key.replace("_", " "), _readable(value))
        console.print(table)


def machine_info() -> dict[str, Any]:
    """Versions, devices, threads, sizes and mixers."""
    packages = ("ebb-lm", "torch", "accelerate", "datasets", "tokenizers", "safetensors")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector_instructions": torch.backends.cpu.get_cpu_capability(),
            "recurrences": native.status(),
            "products in training": choose_precision("auto", training_device()),
            "devices": ", ".join(devices) or "cpu",
        },
        "sizes": [
            {"size": name, "layers": s.num_layers, "width": s.d_model, "head": s.head_dim}
            for name, s in SIZES.items()
        ],
        "ops": [_op_row(name) for name in OPS],
        "mixers": [_mixer_row(name) for name in MIXERS],
        "scores of attention": [_score_row(name) for name in SCORES],
    }


def checkpoint_info(folder: Path) -> dict[str, Any]:
    """Configuration, parameters, state and half-lives of a checkpoint."""
    model, settings = load_model(folder)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        names = name.split(".")
        part = names[2] if names[0] == "blocks" else names[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    config = model.config.to_dict()
    options = config.pop("options")
    lives: list[dict[str, float]] = []
    if (folder / TOKENIZER).exists():  # an imported model may have none
        tokenizer = read_tokenizer(folder, settings, model.config.vocab_size)
        lives = half_lives(model, torch.tensor([known_text(tokenizer, TOKENS)[1]]))
    report = {
        "model": {**config, **options, "fingerprint": model.fingerprint()},
        "training": settings["train"],
        "parameters": {**parts, "all": model.num_parameters()},
        "state, batch 1": _model_state(model),
    }
    if lives:
        report["half-lives of the decays in tokens, on the built-in text"] = [
            {"layer": layer, **{name: three_digits(value) for name, value in row.items()}}
            for layer, row in enumerate(lives)
        ]
    return report


def _model_state(model: LanguageModel) -> dict[str, str]:
    """The state at several contexts, and where a KV cache would be smaller."""
    size, options = StateSize.of(model), model.config.options
    shown = {f"{context:,} tokens": f"{size.at(context):,} bytes" for context in CONTEXTS}
    if isinstance(options, AttentionOptions) and options.state == "constant":
        config = dataclasses.replace(
            model.config, options=dataclasses.replace(options, state="cache")
        )
        until = smaller_cache_until(size, StateSize.of(LanguageModel(config)))
        shown["a KV cache is smaller"] = f"up to {until:,} tokens"
    return shown


class StateSize(NamedTuple):
    """Bytes of a state at batch 1: every state is a constant, or grows linearly with the tokens."""

    first: int
    """After one token."""
    growth: int
    """For every further token."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: LanguageModel) -> "StateSize":
        """Measured after one token and after two."""
        one, two = (
            states.num_bytes(model.features(torch.zeros(1, tokens, dtype=torch.long))[1])
            for tokens in (1, 2)
        )
        return cls(one, two - one)

    def at(self, context: int) -> int:
        """After so many tokens."""
        return self.first + self.growth * (context - 1)


def layer_state(mixer: str) -> StateSize:
    """Of one layer of the micro size, for a mixer as the command line names it."""
    config = dataclasses.replace(preset("micro", mixer, 2), num_layers=1, ffn_dim=None)
    return StateSize.of(LanguageModel(config))


def mixers_markdown() -> str:
    """The README's tables of mixers and scores, from `MIXERS` and `SCORES`."""
    mixers = [
        "| `--mixer` | the recurrence | state of a layer, size `micro` | source |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in MIXERS.items():
        mixers.append(
            f"| `{name}` | {row.equation} | {_in_words(layer_state(name))} | {_link(row.source)} |"
        )
    scores = [
        "| `--mixer attention:` | weights of a row of t scores s | exact with a constant state | "
        "source |",
        "| --- | --- | --- | --- |",
    ]
    for name, score in SCORES.items():
        scores.append(
            f"| `{name}` | {score.equation} | {_constant_state(name) or ''} | "
            f"{_link(score.source)} |"
        )
    return "\n".join([*mixers, "", *scores])


def _op_row(name: str) -> dict[str, Any]:
    """An op with the forms that run here."""
    compiled = ("native",) if OPS[name].native and native.is_available() else ()
    return {"op": name, "forms": ", ".join((*FORMS, *compiled))}


def _mixer_row(name: str) -> dict[str, Any]:
    """A mixer with the state of one layer of the micro size, at batch 1."""
    row, size = MIXERS[name], layer_state(name)
    sizes = {f"{context:,} tokens": readable_bytes(size.at(context)) for context in CONTEXTS}
    return {
        "mixer": name,
        "op": row.op,
        **{f"layer state, {context}": size for context, size in sizes.items()},
        "source": row.source,
    }


def _score_row(name: str) -> dict[str, Any]:
    """A score of `attention`, and what its state of constant size would be."""
    score = SCORES[name]
    return {
        "attention": name,
        "weights of t scores s": score.equation,
        "constant state of a layer": _constant_state(name) or "none",
        "source": score.source or "",
    }


def _constant_state(score: str) -> str | None:
    """Its size, and the context up to which a KV cache is smaller; None where there is none."""
    if not SCORES[score].exact:
        return None
    size = layer_state(f"attention:{score}:constant")
    until = smaller_cache_until(size, layer_state(f"attention:{score}"))
    return f"{readable_bytes(size.first)}; a KV cache is smaller up to {until:,} tokens"


def smaller_cache_until(constant: StateSize, cache: StateSize) -> int:
    """The longest context at which a state that grows takes no more than one that does not."""
    return (constant.first - cache.first) // cache.growth + 1


def _in_words(size: StateSize) -> str:
    return f"{size.growth:,} bytes a token" if size.growth else f"{size.first:,} bytes"


def _link(source: str | None) -> str:
    if source is None:
        return ""
    return f"[{source}](https://arxiv.org/abs/{source.removeprefix('arXiv ')})"


def _readable(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
