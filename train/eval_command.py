"""`ebb eval`: how well a checkpoint predicts a text, and what a longer context is worth to it."""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from data.corpora import load_corpus
from data.joined import JoinedTokens, Tokens
from data.loader import sequential_stretches
from data.packing import default_cache_dir, pack
from model.decode import check_weights, with_rounded_weights
from model.language_model import LanguageModel
from train.checkpoint import Checkpoint, load_checkpoint
from train.evaluate import STRETCH, Evaluation, check_window, evaluate, evaluate_windows
from train.lengths import LengthStudy, study_lengths, study_size
from train.progress import Display
from train.settings import at_least

PLOT = "lengths.png"


@dataclass(frozen=True)
class EvalConfig:
    """Loss, perplexity and bits per byte of a checkpoint on a text.

    The text is read from beginning to end with the state carried through, so that every token is
    predicted from all that stands before it in its document; and again in windows of the training
    context, each from a fresh state, which is the loss that papers report.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a run, such as checkpoints/rwkv7-micro-sotu."""
    data: str | None = None
    """As in `ebb train`; the data it was trained on if not given."""
    column: str | None = None
    """Column or key that holds the text; as in training if not given."""
    split: str = "validation"
    """validation, train, or all."""
    context: int | None = None
    """Tokens in a window; the training context if not given."""
    extrapolate: int | None = None
    """Read windows of 1, 2, 4, ... so many contexts too, such as 32: the loss by position, whether
    longer windows help on the same tokens, and a plot. A short text is read as far as it goes."""
    plot: Path | None = None
    """PNG that --extrapolate writes; lengths.png in the checkpoint's folder if not given."""
    stretch: int = STRETCH
    """Tokens a forward pass; the result does not depend on it but for rounding."""
    max_tokens: int | None = None
    """Read so many at most, the first of which is not predicted; the whole text if not given."""
    weights: str = "fp32"
    """What the matrices are rounded to: fp32, bf16, int8 or int4, as `ebb generate --weights` keeps
    them. The text is read once more then, to say what the rounding costs."""
    best: bool = False
    """The weights with the lowest validation loss instead of the last."""
    threads: int | None = None
    """CPU threads; what PyTorch chooses if not given."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __post_init__(self) -> None:
        """Refuses what cannot be done.

        Raises:
            ValueError: naming the setting.
        """
        if self.split not in ("validation", "train", "all"):
            raise ValueError(f"split must be validation, train or all, but is {self.split!r}")
        for name in ("stretch", "threads", "context"):
            at_least(name, getattr(self, name), 1)
        at_least("max_tokens", self.max_tokens, 2)
        longest = self.extrapolate
        if longest is not None and (longest < 2 or longest & (longest - 1)):
            raise ValueError(f"extrapolate must be 2, 4, 8, 16, 32, ..., but is {longest}")
        if self.plot is not None and longest is None:
            raise ValueError("plot is what --extrapolate draws: add --extrapolate 32, or leave it")
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise ValueError(f"plot must be the name of a .png, but is {str(self.plot)!r}")
        check_weights(self.weights)


class _Results(NamedTuple):
    """All that was measured."""

    carried: Evaluation
    exact: Evaluation
    """The same without rounding the weights."""
    context: int | None
    windowed: Evaluation | None
    """None where no context is known, or the text is shorter than one."""
    study: LengthStudy | None


def evaluate_checkpoint(config: EvalConfig) -> None:
    """Runs `ebb eval`.

    Raises:
        ValueError: for a checkpoint or data that cannot be read.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_checkpoint(config.checkpoint, best=config.best)
    context = config.context or checkpoint.config["train"].get("context")
    if config.extrapolate is not None and context is None:
        raise ValueError(
            f"{config.checkpoint} does not say what context it was trained on: give --context"
        )
    with Display() as display:
        text, tokens = _tokens(config, checkpoint, display)
        if config.extrapolate is not None:
            check_window(tokens.size, context)
        results = _measure(config, checkpoint, tokens, context, display)
    plot = None if results.study is None else config.plot or config.checkpoint / PLOT
    if config.json:
        sys.stdout.write(json.dumps(_report(config, text, results, plot)) + "\n")
    else:
        _print(config, text, results)
    if results.study is not None:
        from train.lengths_plot import save_lengths_plot  # matplotlib is slow to import

        assert plot is not None
        save_lengths_plot({checkpoint.model.config.mixer: results.study}, plot)
        if not config.json:
            sys.stdout.write(f"Plot: {plot}\n")


def _tokens(config: EvalConfig, checkpoint: Checkpoint, display: Display) -> tuple[str, Tokens]:
    """The name of the text, and its tokens."""
    trained = checkpoint.config["train"]
    if config.data is None and "data" not in trained:
        raise ValueError(f"{config.checkpoint} does not say what it was trained on: give --data")
    corpus = load_corpus(
        config.data or trained["data"],
        column=config.column or ("text" if config.data else trained.get("column", "text")),
        stream=None if config.data else trained.get("stream"),
    )
    with display.task("Tokenising", corpus.num_bytes) as advance:
        packed = pack(corpus, checkpoint.tokenizer, default_cache_dir(), advance)
    sides = {"train": packed[:1], "validation": packed[1:], "all": packed}[config.split]
    tokens = JoinedTokens([side.tokens for side in sides])  # they stay on the disk
    return corpus.name, tokens[: config.max_tokens]


def _measure(
    config: EvalConfig,
    checkpoint: Checkpoint,
    tokens: Tokens,
    context: int | None,
    display: Display,
) -> _Results:
    model, end_id = checkpoint.model, checkpoint.tokenizer.end_id
    token_bytes = checkpoint.tokenizer.token_bytes()

    def carried(name: str, model: LanguageModel) -> Evaluation:
        stretches = sequential_stretches(tokens, context=config.stretch, end_id=end_id)
        with display.task(name, tokens.size) as advance:
            return evaluate(model, stretches, token_bytes, carry_state=True, progress=advance)

    result = exact = carried("Evaluating", model)
    if config.weights != "fp32":
        model = with_rounded_weights(model, config.weights)
        result = carried(f"Evaluating {config.weights}", model)
    windowed = study = None
    if context is not None and context < tokens.size:
        with display.task("Evaluating windows", tokens.size) as advance:
            windowed = evaluate_windows(
                model,
                tokens,
                token_bytes,
                context=context,
                end_id=end_id,
                stretch=config.stretch,
                progress=advance,
            )
    if config.extrapolate is not None:
        assert context is not None
        size = study_size(tokens.size, context, config.extrapolate)
        with display.task("Lengthening windows", size) as advance:
            study = study_lengths(
                model,
                tokens,
                context=context,
                end_id=end_id,
                longest=config.extrapolate,
                stretch=config.stretch,
                progress=advance,
            )
    return _Results(result, exact, context, windowed, study)


def _report(config: EvalConfig, text: str, results: _Results, plot: Path | None) -> dict[str, Any]:
    """For `--json`: the loss with the state carried first, the others below their names."""
    windowed, study = results.windowed, results.study
    return {
        **_numbers(results.carried),
        "data": text,
        "split": config.split,
        "weights": config.weights,
        "perplexity_fp32": results.exact.perplexity,
        "windowed": windowed and {"context": results.context, **_numbers(windowed)},
        "extrapolation": study
        and {**dataclasses.asdict(study), "findings": study.findings(), "plot": str(plot)},
    }


def _numbers(evaluation: Evaluation) -> dict[str, float]:
    return {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "tokens": evaluation.tokens,
        "bytes": evaluation.bytes,
    }


def _print(config: EvalConfig, text: str, results: _Results) -> None:
    carried, exact, windowed = results.carried, results.exact, results.windowed
    cost = ""
    if config.weights != "fp32":
        more = 100 * math.expm1(carried.loss - exact.loss)
        cost = (
            f", {more:+.3f} % against {exact.perplexity:.2f} without rounding to {config.weights}"
        )
    lines = [
        f"{text} ({config.split}): {carried.tokens:,} tokens, {carried.bytes:,} bytes",
        f"loss           {carried.loss:.4f} nats per token, with the state carried through",
        f"perplexity     {carried.perplexity:.2f} per token{cost}",
        f"bits per byte  {carried.bits_per_byte:.4f}",
    ]
    if windowed is not None:
        lines.append(
            f"windowed loss  {windowed.loss:.4f} nats per token, {windowed.bits_per_byte:.4f} bits "
            f"per byte, in windows of {results.context:,} with a fresh state each"
        )
    elif results.context is not None:
        lines.append(
            f"windowed loss  none: the text is shorter than {results.context:,} tokens and the one "
            "after"
        )
    else:
        lines.append("windowed loss  none: no training context is known, give --context")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if results.study is not None:
        _print_study(results.study)


def _print_study(study: LengthStudy) -> None:
    console = Console(file=sys.stdout, highlight=False)
    console.print()
    longest = study.lengths[-1].length
    table = Table(box=box.SIMPLE, title="Loss by position")
    for heading in ("tokens seen", "loss", "tokens"):
        table.add_column(heading, justify="right")
    for group in study.positions:
        seen = f"{group.most:,}"
        if group.fewest < group.most:
            seen = f"{group.fewest:,} to {seen}"
        table.add_row(seen, f"{group.loss:.4f}", f"{group.tokens:,}")
    console.print(table)
    table = Table(
        box=box.SIMPLE,
        title=f"Loss by the length of the window, on the same {study.tokens:,} tokens",
    )
    last = f"last {study.context:,} of {longest:,}"
    for heading in ("window", "contexts", "loss", last, "against 1 context", "they see"):
        table.add_column(heading, justify="right")
    for row in study.lengths:
        margin = "" if row.margin is None or row is study.lengths[0] else f" ± {row.margin:.4f}"
        table.add_row(
            f"{row.length:,}",
            f"{row.length // study.context}",
            f"{row.loss:.4f}",
            f"{row.last:.4f}",
            f"{row.gain:+.4f}{margin}",
            f"{row.seen:,.0f}",
        )
    console.print(table)
    sys.stdout.write("".join(f"{line}\n" for line in study.findings()))
