"""`ebb info`: the machine and the mixers, or one checkpoint."""

import dataclasses
import itertools
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

from data.corpora import load_corpus
from model import state as states
from model.config import SIZES
from model.language_model import LanguageModel
from model.layers import MIXERS
from model.ops import FORMS, OPS
from model.presets import preset
from train.checkpoint import load_checkpoint
from train.half_lives import TOKENS, half_lives
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

    def __post_init__(self) -> None:
        """Refuses what has no effect.

        Raises:
            ValueError: naming the setting.
        """
        if self.markdown and (self.json or self.checkpoint is not None):
            raise ValueError("markdown prints the table of mixers only: leave the rest out")


def info(config: InfoConfig) -> None:
    """Runs `ebb info`.

    Raises:
        ValueError: for a checkpoint that cannot be read.
    """
    if config.markdown:
        sys.stdout.write(mixers_markdown() + "\n")
        return
    report = machine_info() if config.checkpoint is None else checkpoint_info(config.checkpoint)
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
            "devices": ", ".join(devices) or "cpu",
        },
        "sizes": [
            {"size": name, "layers": s.num_layers, "width": s.d_model, "head": s.head_dim}
            for name, s in SIZES.items()
        ],
        "ops": [{"op": name, "forms": ", ".join(FORMS)} for name in OPS],
        "mixers": [_mixer_row(name) for name in MIXERS],
    }


def checkpoint_info(folder: Path) -> dict[str, Any]:
    """Configuration, parameters, state and half-lives of a checkpoint."""
    checkpoint = load_checkpoint(folder)
    model = checkpoint.model
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        names = name.split(".")
        part = names[2] if names[0] == "blocks" else names[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    config = model.config.to_dict()
    options = config.pop("options")
    text = "".join(itertools.islice(load_corpus("sotu").validation, 1))
    ids = checkpoint.tokenizer.encode(text[: 8 * TOKENS])[:TOKENS]
    lives = half_lives(model, torch.tensor([ids]))
    report = {
        "model": {**config, **options, "fingerprint": model.fingerprint()},
        "training": checkpoint.config["train"],
        "parameters": {**parts, "all": model.num_parameters()},
        "state, batch 1": StateSize.of(model).at_contexts(),
    }
    if lives:
        report["half-lives of the decays in tokens, on the built-in text"] = [
            {"layer": layer, **{name: three_digits(value) for name, value in row.items()}}
            for layer, row in enumerate(lives)
        ]
    return report


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

    def at_contexts(self) -> dict[str, str]:
        """For the tables."""
        return {f"{context:,} tokens": f"{self.at(context):,} bytes" for context in CONTEXTS}


def layer_state(mixer: str) -> StateSize:
    """Of one layer of the micro size, for a mixer as the command line names it."""
    config = dataclasses.replace(preset("micro", mixer, 2), num_layers=1, ffn_dim=None)
    return StateSize.of(LanguageModel(config))


def mixers_markdown() -> str:
    """The README's table of mixers, from `MIXERS`."""
    lines = [
        "| `--mixer` | the recurrence | state of a layer, size `micro` | source |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in MIXERS.items():
        size = layer_state(name)
        state = f"{size.growth:,} bytes a token" if size.growth else f"{size.first:,} bytes"
        number = row.source.removeprefix("arXiv ")
        link = f"[{row.source}](https://arxiv.org/abs/{number})"
        lines.append(f"| `{name}` | {row.equation} | {state} | {link} |")
    return "\n".join(lines)


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


def _readable(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
