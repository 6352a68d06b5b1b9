"""`ebb info`: the machine and the mixers, or one checkpoint."""

import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from model import state as states
from model.config import SIZES, ModelConfig
from model.language_model import LanguageModel
from model.layers import MIXERS
from train.checkpoint import load_checkpoint

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


def info(config: InfoConfig) -> None:
    """Runs `ebb info`.

    Raises:
        ValueError: for a checkpoint that cannot be read.
    """
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
        "mixers": [_mixer_row(name) for name in MIXERS],
    }


def checkpoint_info(folder: Path) -> dict[str, Any]:
    """Configuration, parameters and state of a checkpoint."""
    checkpoint = load_checkpoint(folder)
    model = checkpoint.model
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        names = name.split(".")
        part = names[2] if names[0] == "blocks" else names[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    config = model.config.to_dict()
    options = config.pop("options")
    return {
        "model": {**config, **options, "fingerprint": model.fingerprint()},
        "training": checkpoint.config["train"],
        "parameters": {**parts, "all": model.num_parameters()},
        "state, batch 1": _state_sizes(model),
    }


def _mixer_row(name: str) -> dict[str, Any]:
    """A mixer with the state of one layer of the micro size, at batch 1."""
    row = MIXERS[name]
    shape = SIZES["micro"]
    model = LanguageModel(
        ModelConfig(name, 2, shape.d_model, num_layers=1, head_dim=shape.head_dim)
    )
    sizes = _state_sizes(model)
    return {
        "mixer": name,
        "op": row.op,
        **{f"layer state, {context}": size for context, size in sizes.items()},
        "source": row.source,
    }


@torch.no_grad()
def _state_sizes(model: LanguageModel) -> dict[str, str]:
    """Bytes of the state after some tokens; measured at two small lengths, from which it is a line.

    Every state grows linearly or not at all.
    """
    sizes = []
    for tokens in (1, 2):
        _, state = model.features(torch.zeros(1, tokens, dtype=torch.long))
        sizes.append(states.num_bytes(state))
    growth = sizes[1] - sizes[0]
    return {
        f"{context:,} tokens": f"{sizes[0] + growth * (context - 1):,} bytes"
        for context in CONTEXTS
    }


def _readable(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
