"""`ebb demo`: the main job end to end on the built-in text, in a few minutes."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from train.budget import Budget
from train.compare import print_results, run_comparison
from train.compare_config import CompareConfig
from train.progress import Display
from train.settings import CHECKPOINTS, at_least


@dataclass(frozen=True)
class DemoConfig:
    """Train RWKV-7 and a softmax transformer on State of the Union addresses and compare them.

    Takes about four minutes on two cores. Run it again to go on after Ctrl-C, or to see the result.
    """

    out: Path = CHECKPOINTS / "demo"
    """Folder of the comparison."""
    budget: str = "2.5min"
    """Training of both models together; as in `ebb compare`."""
    threads: int | None = None
    """CPU threads; what PyTorch chooses if not given."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run.

        Raises:
            ValueError: naming the setting.
        """
        at_least("threads", self.threads, 1)
        Budget.parse(self.budget)


def demo(config: DemoConfig) -> None:
    """Runs `ebb demo`.

    Raises:
        ValueError: for a folder that cannot be used.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    comparison = CompareConfig(
        mixers="rwkv7,attention",
        size="nano",
        data="sotu",
        tokenizer="bpe",
        vocab_size=2048,
        budget=config.budget,
        batch_size=8,
        context=256,
        eval_tokens=16_384,
        prompt="The people of the United States",
        threads=config.threads,
        out=config.out,
        resume=True,
    )
    with Display() as display:
        display.say(
            "Two language models on 230 years of State of the Union addresses: RWKV-7, whose state "
            "has a fixed size, and a softmax transformer, whose cache grows with every token."
        )
        results = run_comparison(comparison, display)
    console = Console(file=sys.stdout, highlight=False)
    for model in results["models"]:
        sample = model["sample"]
        console.rule(f"{model['mixer']} writes")
        lines = (sample["prompt"] + sample["text"]).splitlines()
        console.print("\n".join(line for line in lines if line.strip()) + "\n", markup=False)
    print_results(results, config.out)
    folder = config.out / "runs" / "rwkv7-0"
    sys.stdout.write(
        f"\nWrite more:  ebb generate {shlex.quote(str(folder))} --prompt 'My fellow citizens,'\n"
        "Your own text:  ebb train --data FILE\n"
    )
