"""The settings of a run: one frozen dataclass is flags, help and `config.json` at once."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import SIZES, parse_mixer

CHECKPOINTS = Path("checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model on a text.

    Writes one folder with weights, tokenizer, settings and metrics; `ebb generate FOLDER` reads it.
    Ctrl-C saves and stops; `--resume` goes on exactly where it was.
    """

    mixer: str = "rwkv7"
    """rwkv7, rwkv6, linear_transformer or attention (`softmax` is short for attention:softmax)."""
    size: str = "micro"
    """nano (4 layers x 128), micro (4 x 256), tiny (8 x 512) or small (12 x 768)."""
    data: str = "sotu"
    """sotu (State of the Union addresses, built in), a text file, a folder or glob of them, a
    .jsonl, .csv or .parquet file, a folder saved by the datasets library, or a Hub name."""
    column: str = "text"
    """Column or key that holds the text, where the data has columns."""
    tokenizer: str = "bpe"
    """bpe (trained on the data), bytes, or the path of a tokenizer.json."""
    vocab_size: int | None = None
    """Vocabulary of a bpe to train; 4096 if not given."""
    steps: int = 2000
    """Optimiser steps in all."""
    batch_size: int = 8
    """Sequences a step."""
    context: int = 256
    """Tokens a sequence."""
    ffn_dim: int | None = None
    """Width inside the channel mix; the mixer's own multiple of its width if not given."""
    learning_rate: float | None = None
    """Peak rate; the mixer's recipe if not given."""
    weight_decay: float | None = None
    """Of matrices; the mixer's recipe if not given."""
    warmup: int | None = None
    """Steps of linear warm-up; a fiftieth of all, but at least 10, if not given."""
    clip: float = 1.0
    """Largest norm of the gradient; what is longer is scaled down to it."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on a GPU that has it, fp32 elsewhere."""
    seed: int = 0
    """Of the weights, the order of the data and the samples."""
    threads: int | None = None
    """CPU threads; what PyTorch chooses if not given."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    eval_every: int | None = None
    """Steps between validations; a tenth of all if not given."""
    eval_tokens: int = 32_768
    """Validation tokens, spread evenly over the text, read at each validation."""
    sample_every: int | None = None
    """Steps between samples; every validation if not given, 0 for none."""
    save_every: int | None = None
    """Steps between checkpoints; every validation if not given. The end is always saved."""
    out: Path | None = None
    """Folder of the run; checkpoints/MIXER-SIZE-DATA if not given."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder; start afresh if there is none."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run.

        Raises:
            ValueError: naming the setting.
        """
        parse_mixer(self.mixer)
        if self.size not in SIZES:
            raise ValueError(f"there is no size {self.size!r}; choose one of {', '.join(SIZES)}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16, but is {self.precision!r}")
        for name in ("steps", "batch_size", "context", "log_every", "eval_tokens"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every", "threads", "ffn_dim", "vocab_size"):
            _at_least(name, getattr(self, name), 1)
        for name in ("seed", "warmup", "sample_every"):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name.replace('_', '-')} must be above 0, but is {value}")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"weight-decay must be at least 0, but is {self.weight_decay}")

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        if self.out is not None:
            return self.out
        data = "".join(c if c.isalnum() else "-" for c in Path(self.data).stem)
        return CHECKPOINTS / f"{self.mixer.replace(':', '-')}-{self.size}-{data}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without what does not belong to the run itself."""
        values = dataclasses.asdict(self)
        for name in NOT_OF_THE_RUN:
            del values[name]
        return values


NOT_OF_THE_RUN = ("out", "resume")
"""Settings that say where and how to start, not what to compute."""

FREE_ON_RESUME = (*NOT_OF_THE_RUN, "log_every", "eval_every", "sample_every", "save_every")
"""Settings that a resumed run may change without becoming another run."""


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name.replace('_', '-')} must be at least {least}, but is {value}")
