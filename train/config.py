"""The settings of a run: one frozen dataclass is flags, help and `config.json` at once."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import parse_size
from train.schedule import SCHEDULES
from train.settings import at_least, default_folder, one_of

OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("auto", "fp32", "bf16", "fp64")


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model on a text.

    Writes one folder with weights, tokenizer, settings and metrics; `ebb generate FOLDER` reads it.
    Ctrl-C saves and stops; `--resume` goes on exactly where it was.
    """

    recipe: str | None = None
    """Where the other settings start from: cpu-2min, cpu-10min or cpu-1h of training on a machine
    with two cores, each with its own values for RWKV and for the other mixers. Flags that are given
    stand above it."""
    init_from: str | None = None
    """Folder of a run or of an imported checkpoint whose weights, shape and tokenizer to start
    from (fine-tuning); of the run, nothing else is taken over."""
    mixer: str = "rwkv7"
    """rwkv4, rwkv5, rwkv6, rwkv7, linear_transformer, retnet, gla, mamba2, deltanet, gated_deltanet
    or attention, which takes a score after a colon (attention:square_l1; `softmax` is short for
    attention:softmax). `ebb info` shows them all."""
    size: str = "micro"
    """nano (4 layers x 128), micro (4 x 256), tiny (8 x 512), small (12 x 768), or layers and width
    such as 4x192."""
    data: str = "sotu"
    """sotu (State of the Union addresses, built in), a text file, a folder or glob of them, a
    .jsonl, .csv or .parquet file, a folder saved by the datasets library, or a name of the Hugging
    Face hub: org/name, org/name:config, org/name:config:split or org/name::split."""
    column: str = "text"
    """Column or key that holds the text, where the data has columns."""
    stream: int | None = None
    """Of a Hub data set, take the first so many documents as they come, without downloading it."""
    tokenizer: str = "bpe"
    """bpe (trained on the data), bytes, or the path of a tokenizer.json or of the vocabulary of
    RWKV World (rwkv_vocab_v20230424.txt)."""
    vocab_size: int | None = None
    """Vocabulary of a bpe to train; 4096 if not given."""
    steps: int = 2000
    """Optimiser steps in all; the schedule ends with them, so a finished run cannot be extended."""
    max_epochs: float | None = None
    """Fewer steps, if they would read the text more often than this; recipes have 10."""
    batch_size: int = 8
    """Sequences a step, of all processes together."""
    context: int = 256
    """Tokens a sequence."""
    accumulate: int = 1
    """Parts that a process computes its share of a step in, one after the other: less memory."""
    checkpoint_activations: bool = False
    """Keep only the input of every block and compute the block again: less memory, a third more
    arithmetic."""
    shard: bool = False
    """Divide weights, gradients and optimiser among the processes instead of copying them."""
    context_parallel: int = 1
    """Processes that share a sequence: each reads a stretch and passes its state on."""
    track: str | None = None
    """Where to send the metrics too: tensorboard, wandb, trackio or another that accelerate knows;
    several with commas between."""
    carry_state: bool = False
    """Read the text in order, each sequence of the batch a part of it, and carry the state from
    every step to the next (truncated back-propagation) instead of starting windows afresh."""
    ffn_dim: int | None = None
    """Width inside the channel mix; the mixer's own multiple of its width if not given."""
    optimizer: str = "adamw"
    """adamw, or muon: Muon for the matrices inside the blocks, AdamW for the rest. Both take the
    same rates."""
    learning_rate: float | None = None
    """Peak rate; the mixer's own if not given. --find-lr suggests one."""
    schedule: str = "cosine"
    """How the rate goes on after the warm-up: cosine, or wsd (it stays, and decays over the last
    fifth)."""
    final_fraction: float | None = None
    """Of the peak rate, where the schedule ends; the mixer's own, 0.1, if not given."""
    weight_decay: float | None = None
    """Of matrices; the mixer's own if not given."""
    dropout: float | None = 0.0
    """Share of what each layer adds to the residual stream that is left out, at random. None, which
    recipes have: by how often the text is read, 0 up to 4 times, 0.1 up to 8, else 0.2."""
    warmup: int | None = None
    """Steps of linear warm-up; a fiftieth of all, but at least 10, if not given."""
    clip: float = 1.0
    """Largest norm of the gradient; what is longer is scaled down to it."""
    precision: str = "auto"
    """Of matrix products in training: bf16, fp32, or auto, which is bf16 on a GPU or CPU (AMX) that
    is fast at it. Validation is in fp32. fp64 is slow, for checks."""
    seed: int = 0
    """Of the weights, the order of the data and the samples."""
    threads: int | None = None
    """CPU threads; what PyTorch chooses if not given."""
    backend: str = "auto"
    """native (compiled kernels), torch, or auto: native where they are compiled."""
    compile: bool = False
    """Compile the blocks with torch.compile first."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite, and which are skipped for that, after
    which training stops."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    eval_every: int | None = None
    """Steps between validations; a tenth of all if not given."""
    eval_tokens: int = 32_768
    """Validation tokens, spread evenly over the text, read at each validation."""
    sample_every: int | None = None
    """Steps between samples; every validation if not given, 0 for none."""
    instruments: str | None = None
    """What else to look at in every validation: attention, states, decays, gradients, with commas
    between, or all. They change nothing that is trained."""
    save_every: int | None = None
    """Steps between checkpoints; every validation if not given. The end is always saved."""
    keep: int = 2
    """Checkpoints to keep, the newest; with 1 there is none to go back to if it is damaged."""
    out: Path | None = None
    """Folder of the run; checkpoints/MIXER-SIZE-DATA if not given."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder; start afresh if there is none."""
    find_lr: bool = False
    """Train no model, but raise the rate over a few hundred steps, draw what the loss does and
    suggest a --learning-rate; with the same other flags as the run that it is for."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run.

        Raises:
            ValueError: naming the setting.
        """
        from model.presets import parse_mixer  # loads torch, which the overview can do without
        from train.recipes import BUDGETS

        parse_mixer(self.mixer)
        if self.instruments is not None:
            from train.instruments import parse_instruments

            parse_instruments(self.instruments)
        if self.carry_state:
            from train.carry import check_can_carry

            check_can_carry(self.mixer)
        parse_size(self.size)
        if self.recipe is not None:
            one_of("recipe", self.recipe, BUDGETS)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("schedule", self.schedule, SCHEDULES)
        for name in ("dropout", "final_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(
                    f"{name.replace('_', '-')} must be at least 0 and below 1, but is {value}"
                )
        if self.find_lr and self.resume:
            raise ValueError("choose one of --find-lr and --resume: the search keeps no checkpoint")
        if self.find_lr and self.carry_state:
            raise ValueError("--find-lr reads windows in any order: leave --carry-state out")
        one_of("precision", self.precision, PRECISIONS)
        for name in ("steps", "batch_size", "context", "log_every", "eval_tokens"):
            at_least(name, getattr(self, name), 1)
        if self.backend not in ("auto", "native", "torch"):
            raise ValueError(f"backend must be auto, native or torch, but is {self.backend!r}")
        for name in ("max_skipped", "keep", "accumulate", "context_parallel"):
            at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every", "threads", "ffn_dim", "vocab_size", "stream"):
            at_least(name, getattr(self, name), 1)
        for name in ("seed", "warmup", "sample_every"):
            at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "clip", "max_epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name.replace('_', '-')} must be above 0, but is {value}")
        if self.warmup is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than the {self.steps} steps, not {self.warmup}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight-decay must be at least 0, but is {self.weight_decay}")

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        if self.out is not None:
            return self.out
        return default_folder(f"{self.mixer.replace(':', '-')}-{self.size}", self.data)

    def saved(self) -> dict[str, Any] | None:
        """The settings that the run in the folder was made with; None if none was made there."""
        from train import checkpoint as files  # loads torch, which --help can do without
        from train.snapshot import read_run

        if not files.holds_run(self.folder):
            return None
        settings: dict[str, Any] = read_run(self.folder)["train"]
        return None if files.IMPORTED in settings else settings

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without what does not belong to the run itself."""
        values = dataclasses.asdict(self)
        for name in NOT_OF_THE_RUN:
            del values[name]
        return values


NOT_OF_THE_RUN = ("out", "resume", "find_lr", "shard", "context_parallel")
"""Settings that say where and how to start, not what to compute; a resumed run is told again."""

FREE_ON_RESUME = (
    *(*NOT_OF_THE_RUN, "log_every", "eval_every", "sample_every", "save_every"),
    *("keep", "max_skipped", "threads", "backend", "compile", "precision"),
    *("accumulate", "checkpoint_activations", "track", "instruments"),
)
"""Settings that a resumed run may change without becoming another run."""
